"""Checkpoints of which text is one part: its configuration, the names of its tensors, and those that are left alone."""

from typing import Any

from tenfold.nn.hf_config import HFConfig, refuse_unknown_modes
from tenfold.nn.param import Tree, also_named

TOWERS = tuple(
    f"{at}{part}.*"
    for at in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio")
)

# What text models name "model.…": transformers 5 and what it trains, and transformers 4.
_PREFIXES = {
    "model.": ("model.language_model.", "language_model.model."),
    "lm_head.": ("language_model.lm_head.",),
}


def text_config(hf: HFConfig, defaults: HFConfig | None = None, *, per_layer: bool = False) -> dict[str, Any]:
    """What `config.json` says of the text part, or all of it if it describes nothing else.

    Args:
        hf: all of it.
        defaults: of the text part, where transformers 4 wrote only what differs from them.
        per_layer: as in `refuse_unknown_modes`.

    Raises:
        UnsupportedModelError: for modes that the family does not implement.
    """
    text = dict(hf) if hf.get("text_config") is None else {**(defaults or {}), **hf["text_config"]}
    if hf.get("tie_word_embeddings") is not None:
        text["tie_word_embeddings"] = hf["tie_word_embeddings"]
    refuse_unknown_modes(text, per_layer=per_layer)
    return text


def text_params(tree: Tree) -> Tree:
    """The declaration of a text model, known also under the names that its tensors have beside other parts."""
    return also_named(tree, _PREFIXES)
