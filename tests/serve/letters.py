"""A vocabulary that makes a counting engine spell the alphabet, so that every expected text can be read off.

The ids are five special tokens, A to Z, a to z, and then all other bytes. `tenfold.testing.scripted_engine` continues a
prompt by counting its last id up: "abc" goes on as "defg...", and a conversation, which ends with `<|assistant|>`, is
answered "ABCD...".
"""

import json
import string
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

SPECIALS = ["<|bos|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>"]
BOS, END = 0, 1
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('tools have no place here') }}{% endif %}"
    "{{ '<|' + m.role + '|>' + (m.content or '') }}"
    "{% if not loop.last or m.role != 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if suffix is defined %}{{ suffix }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def ids(text: str) -> list[int]:
    """The ids of a text of letters."""
    return [len(SPECIALS) + string.ascii_letters.swapcase().index(letter) for letter in text]


def write(directory: Path) -> Path:
    """Write the tokenizer's files and return their directory."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    letters = string.ascii_uppercase + string.ascii_lowercase
    pieces = [*SPECIALS, *letters, *sorted(set(alphabet) - set(letters))]
    vocabulary = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    vocabulary.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIALS])
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary.decoder = decoders.ByteLevel()
    vocabulary.post_processor = processors.TemplateProcessing(
        single=f"{SPECIALS[BOS]} $A", pair=f"{SPECIALS[BOS]} $A $B", special_tokens=[(SPECIALS[BOS], BOS)]
    )
    vocabulary.save(str(directory / "tokenizer.json"))
    config = {"bos_token": SPECIALS[BOS], "eos_token": SPECIALS[END], "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
