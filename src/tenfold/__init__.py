"""Tenfold: train models, serve them at scale and keep them healthy, from one declaration of each model in JAX."""

from typing import TYPE_CHECKING

from tenfold.engine.outputs import CompletionOutput, RequestOutput
from tenfold.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tenfold.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """Imports `LLM`, and with it jax, when it is first used: `import tenfold` stays fast."""
    if name == "LLM":
        from tenfold.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'tenfold' has no attribute {name!r}")
