"""The options of `tenfold serve`. Names are vLLM's where it has them."""

from enum import StrEnum
from typing import Annotated

import typer

_MODEL, _HTTP, _ENGINE = "Model", "HTTP", "Engine"


class LogLevel(StrEnum):
    """Levels of the log, which goes to standard error."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class GenerationConfig(StrEnum):
    """Where the defaults of sampling come from."""

    AUTO = "auto"
    VLLM = "vllm"


# --- the model -------------------------------------------------------------------------------------------------------

Model = Annotated[
    str | None,
    typer.Argument(
        help="A directory, a Hugging Face id, or a gs://, s3:// or file:// URI; if left out, pico, built in."
    ),
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(help="Id that requests ask for. May be repeated; responses carry the first.", rich_help_panel=_MODEL),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Where the tokenizer is, if not with the model.", rich_help_panel=_MODEL)
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.", rich_help_panel=_MODEL)
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="Jinja source, a file, or the name of one of the model's templates.", rich_help_panel=_MODEL),
]
Generation = Annotated[
    GenerationConfig,
    typer.Option(help="Defaults of sampling: auto takes the model's, vllm takes vLLM's.", rich_help_panel=_MODEL),
]

# --- HTTP ------------------------------------------------------------------------------------------------------------

Host = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_HTTP)]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", rich_help_panel=_HTTP)]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(help="Key that clients must send. May be repeated. TENFOLD_API_KEY adds more.", rich_help_panel=_HTTP),
]
RootPath = Annotated[str, typer.Option(help="Prefix of all addresses behind a proxy.", rich_help_panel=_HTTP)]
SslKeyfile = Annotated[str | None, typer.Option(help="Private key, for HTTPS.", rich_help_panel=_HTTP)]
SslCertfile = Annotated[str | None, typer.Option(help="Certificate, for HTTPS.", rich_help_panel=_HTTP)]
MaxRequestBytes = Annotated[str, typer.Option(help="Longest request body.", rich_help_panel=_HTTP)]
ShutdownTimeout = Annotated[
    float, typer.Option(help="Seconds that requests in flight may take when the server stops.", rich_help_panel=_HTTP)
]
DisableAccessLog = Annotated[
    bool, typer.Option("--disable-uvicorn-access-log", help="Do not log every request.", rich_help_panel=_HTTP)
]
UvicornLogLevel = Annotated[LogLevel, typer.Option(help="What of HTTP to log.", rich_help_panel=_HTTP)]
Level = Annotated[LogLevel, typer.Option(help="What to log.", rich_help_panel=_HTTP)]

# --- the engine ------------------------------------------------------------------------------------------------------

Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_ENGINE)]
Quantization = Annotated[
    str | None,
    typer.Option(help="int8 or int4: round the weights while they are loaded.", rich_help_panel=_ENGINE),
]
KvCacheDtype = Annotated[
    str, typer.Option(help="auto, or int8 or fp8: keys and values in 8 bits.", rich_help_panel=_ENGINE)
]
MaxModelLen = Annotated[
    str | None, typer.Option(help="Longest prompt and output together, such as 4096 or 4K.", rich_help_panel=_ENGINE)
]
MaxNumSeqs = Annotated[int, typer.Option(help="Sequences that run at once.", rich_help_panel=_ENGINE)]
MaxNumBatchedTokens = Annotated[str, typer.Option(help="Token budget of a step.", rich_help_panel=_ENGINE)]
BlockSize = Annotated[int, typer.Option(help="Tokens of a cache page.", rich_help_panel=_ENGINE)]
KvCacheMemory = Annotated[str | None, typer.Option(help="Size of the cache, such as 4GiB.", rich_help_panel=_ENGINE)]
MemoryUtilization = Annotated[
    float, typer.Option(help="Share of the device's memory to use, also on a CPU.", rich_help_panel=_ENGINE)
]
EnablePrefixCaching = Annotated[
    bool, typer.Option(help="Reuse the cache of prompts that begin alike.", rich_help_panel=_ENGINE)
]
MaxWaiting = Annotated[
    int, typer.Option(help="Sequences that may wait for a slot; more are refused with 429.", rich_help_panel=_ENGINE)
]
Seed = Annotated[int, typer.Option(help="Of the seeds of requests that bring none.", rich_help_panel=_ENGINE)]
