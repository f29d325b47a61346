"""Engines in processes of their own, each with the Python that it is installed in, timed from outside."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHONS = {
    "tenfold": Path(sys.executable),
    "transformers": ROOT / ".venv-peers" / "bin" / "python",
    "llama.cpp": ROOT / ".venv-llama" / "bin" / "python",
}
PROMPT, DECODED = 32, 32


class Worker:
    """An engine behind a pipe.

    Args:
        engine: a name that the script knows.
        arguments: of the script.
        script: `cpu_worker.py`, or another of the same manners.
        python: that runs it, if not the engine's own.
        options: for the engine's loader.
    """

    def __init__(
        self, engine: str, *arguments: Path, script: str = "cpu_worker.py", python: Path | None = None, **options: Any
    ) -> None:
        command = [python or PYTHONS[engine], HERE / script, engine, *arguments, json.dumps(options)]
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a benchmark's worker died; see its message above")
        return json.loads(line)

    def seconds(self, streams: int, prompt: int, tokens: int, vocabulary: int = 32_000) -> float:
        """Time to answer `streams` new prompts of `prompt` tokens with `tokens` each; no prefix cache helps."""
        prompts = [[random.randrange(10, vocabulary) for _ in range(prompt)] for _ in range(streams)]
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._process.stdin, flush=True)
        return self._read()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def decode_rate(self, streams: int) -> float:
        """Tokens per second of all streams together, after the first token: neither prefill nor start-up is in it."""
        whole = self.seconds(streams, PROMPT, DECODED + 1)
        return streams * DECODED / (whole - self.seconds(streams, PROMPT, 1))

    def prefill_rate(self, tokens: int) -> float:
        """Prompt tokens per second up to the first token."""
        return tokens / self.seconds(1, tokens, 1)
