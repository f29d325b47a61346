"""What fine-tuning teaches the built-in model, and that what it writes is served as it is."""

import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI

from bench.teach_pico import ask, draw, teach

SMALL = ["--max-model-len", "128", "--max-num-seqs", "2", "--max-num-batched-tokens", "64"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["all weights", "adapters"])
def test_held_out_questions_are_answered_better_and_served(kind: str, tmp_path: Path) -> None:
    training, held_out = draw(0)
    held_out = held_out[:50]
    assert ask(None, held_out) == 0
    model = teach(tmp_path, training, kind, 60, 0)
    assert ask(model, held_out) > 0.3
    tenfold = Path(sys.executable).with_name("tenfold")
    serve = [tenfold, "serve", model, "--served-model-name", "taught", "--port", "0", *SMALL]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        base_url = server.stdout.readline().split()[1].partition("/v1/")[0] + "/v1"
        message = {"role": "user", "content": held_out[0][0]}
        answer = OpenAI(base_url=base_url, api_key="none").chat.completions.create(
            model="taught", messages=[message], temperature=0
        )
        server.terminate()
    assert "in the module" in (answer.choices[0].message.content or "")
