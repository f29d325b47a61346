"""pico's tokenizer: byte-level BPE learnt from the corpus, and the files that make it a Hugging Face tokenizer."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tenfold.base.errors import TokenizerError
from tenfold.train.pico.conversations import SMALL_TALK, Message, questions, unknown_answer
from tenfold.train.pico.corpus import entries, sources

VOCAB_SIZE = 4096

BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (BOS, EOS, PAD, END, *ROLES.values())
"""The special tokens in the order of their ids, from 0."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('pico knows the roles system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# A word with at most one character before it (a space, a dot, an underscore), single digits, punctuation, white space.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_ANSWER_WEIGHT = 8
"""How often the answers are shown to BPE: the model recites them, so they should be short in tokens."""

_SOURCE_SHARE = 0.3
"""Share of the library's files that BPE is shown."""


def train_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn the tokenizer. The same interpreter and version of `tokenizers` give the same vocabulary.

    Text that is encoded with special tokens starts with `<|bos|>`; the chat template writes that token itself.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, token_id(tokenizer, BOS))]
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token.

    Raises:
        TokenizerError: the tokenizer lacks it.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise TokenizerError(f"The tokenizer has no token {token}: it is not pico's. Train it with `train_tokenizer`.")
    return found


def write_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which holds the chat template."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    _write_json(directory / "tokenizer_config.json", {
        "added_tokens_decoder": {
            str(token_id(tokenizer, token)): {"content": token, **special} for token in SPECIAL_TOKENS
        },
        "additional_special_tokens": [END, *ROLES.values()],
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })  # fmt: skip


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `generation_config.json` says: answers are greedy, and stop at the end of a message as well as of a text."""
    return {
        "bos_token_id": token_id(tokenizer, BOS),
        "do_sample": False,
        "eos_token_id": [token_id(tokenizer, EOS), token_id(tokenizer, END)],
        "pad_token_id": token_id(tokenizer, PAD),
    }


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The token ids of the rendered chat template, and which of them pico has to predict.

    Those are the assistant's tokens and the `<|end|>` after them, not the `<|assistant|>` that the prompt ends with.

    Raises:
        TokenizerError: a message has a role that the chat template refuses.
    """
    end = token_id(tokenizer, END)
    ids, mask = [token_id(tokenizer, BOS)], [False]
    for message in messages:
        if message["role"] not in ROLES:
            raise TokenizerError(f"pico has no role {message['role']!r}. Use one of {', '.join(ROLES)}.")
        content = tokenizer.encode(message["content"], add_special_tokens=False).ids
        spoken = message["role"] == "assistant"
        ids += [token_id(tokenizer, ROLES[message["role"]]), *content, end]
        mask += [False, *([spoken] * (len(content) + 1))]
    return ids, mask


def encode_source(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of one file of source code, from `<|bos|>` to `<|eos|>`."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [token_id(tokenizer, BOS), *ids, token_id(tokenizer, EOS)]


def _text() -> Iterator[str]:
    table = entries(("function", "class", "method"))
    for entry in table:
        for question in questions(entry)[:3]:
            yield question
        yield from [entry.answer] * _ANSWER_WEIGHT
    for question, answer in SMALL_TALK:
        yield from (question, answer, unknown_answer("it"))
    rng = random.Random(0)
    yield from (text for text in sources() if rng.random() < _SOURCE_SHARE)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
