"""The model that comes with the package."""

from pathlib import Path

BUILTIN_MODEL = "pico"


def builtin_model() -> Path:
    """The directory of the built-in model, in Hugging Face format."""
    return Path(__file__).parent.parent / BUILTIN_MODEL
