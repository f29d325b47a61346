"""A server over a scripted engine: `python scripted_server.py TOKENIZER_DIR SETTINGS`.

SETTINGS is JSON: `script`, `engine` and `server` hold fields of Script, EngineConfig and ServerConfig. The address is
printed when the server is ready.
"""

import json
import sys
from pathlib import Path

from tenfold.data.tokenizer import Tokenizer
from tenfold.engine.config import EngineConfig
from tenfold.runtime.engine_process import EngineProcess
from tenfold.serve.config import ServerConfig
from tenfold.serve.server import HttpOptions, listen, serve
from tenfold.serve.state import ServerState
from tenfold.testing.scripted_engine import Script, worker_command


def main(directory: Path, settings: dict[str, dict[str, object]]) -> None:
    script = {"vocab_size": 261, "eos_token_ids": (1,)} | settings.get("script", {})
    http = HttpOptions(port=0, access_log=False)
    config = ServerConfig(**{"model_names": ("letters", "alphabet")} | settings.get("server", {}))
    engine = EngineProcess(
        directory, EngineConfig(**settings.get("engine", {})), command=worker_command(Script(**script))
    )
    with listen(http) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serve(
            lambda: ServerState(engine, Tokenizer.load(directory), config),
            http,
            listener,
            lambda: print(url, flush=True),
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
