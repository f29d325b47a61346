"""Tenfold: train models, serve them at scale and keep them healthy, from one declaration of each model in JAX."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenfold.engine.llm import LLM
    from tenfold.engine.outputs import CompletionOutput, RequestOutput
    from tenfold.engine.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

_DEFINED_IN = {
    "LLM": "tenfold.engine.llm",
    "CompletionOutput": "tenfold.engine.outputs",
    "RequestOutput": "tenfold.engine.outputs",
    "SamplingParams": "tenfold.engine.sampling_params",
}


def __getattr__(name: str) -> object:
    """Imports a public name, and with `LLM` jax, when it is first used: `import tenfold` stays fast."""
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'tenfold' has no attribute {name!r}")
    return getattr(importlib.import_module(_DEFINED_IN[name]), name)
