"""Text and data on the host: tokenizers, chat templates and incremental detokenisation. Imports no jax."""

from tenfold.data.detokenizer import Detokenizer, StopStrings
from tenfold.data.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopStrings", "Tokenizer"]
