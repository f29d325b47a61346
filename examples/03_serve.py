"""Start a server and stream an answer from it with the openai client. Run: python examples/03_serve.py"""

import subprocess
import sys
from pathlib import Path

from openai import OpenAI

OPTIONS = [
    "--port",
    "0",
    "--max-model-len",
    "256",
    "--kv-cache-memory-bytes",
    "64MiB",
    "--uvicorn-log-level",
    "warning",
]


def main() -> None:
    """Serve the built-in model on a free port, talk to it, and stop it."""
    command = [Path(sys.executable).with_name("tenfold"), "serve", *OPTIONS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = server.stdout.readline()  # the first line comes when the server is ready: curl http://HOST:PORT/v1/...
        base_url = ready.split()[1].partition("/v1/")[0] + "/v1"
        client = OpenAI(base_url=base_url, api_key="none")
        stream = client.chat.completions.create(
            model="pico",
            messages=[{"role": "user", "content": "What does os.path.join do?"}],
            temperature=0,
            stream=True,
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
        server.terminate()


if __name__ == "__main__":
    main()
