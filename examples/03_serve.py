"""Start a server and stream an answer from it with the openai client. Run: python examples/03_serve.py"""

import subprocess
import sys
from pathlib import Path

from openai import OpenAI

SMALL = ["--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]  # fewer programs to compile
QUESTION = "What does os.path.join do?"


def main() -> None:
    """Serve the built-in model on a free port, talk to it, and stop it."""
    tenfold = Path(sys.executable).with_name("tenfold")
    with subprocess.Popen([tenfold, "serve", "--port", "0", *SMALL], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        greeting = server.stdout.readline()  # printed when the server is ready: curl http://127.0.0.1:41235/v1/...
        base_url = greeting.split()[1].partition("/v1/")[0] + "/v1"
        client = OpenAI(base_url=base_url, api_key="none")
        stream = client.chat.completions.create(
            model="pico", messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
        server.terminate()


if __name__ == "__main__":
    main()
