"""Small tokenizers of every kind that checkpoints come with, built with the `tokenizers` library."""

import functools
import json
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tenfold.data.gguf_tokenizer import TokenType
from tenfold.data.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 12345 degrees!",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\t# three",
    "Größe, façade, naïve, señor, Ελληνικά, русский язык, हिन्दी, ไทย",
    "日本語のテキストと中文文本, 한국어 문장。",
    "🎉🎊 👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👍🏽 emoji and ∑∫√ signs",
] * 3
SPELLED = ["The quick brown fox jumps over the lazy dog, doesn't it? It's 12345!", "Größe λόγος 日本語 🎉"] * 3
"""What the vocabularies with byte fallback are trained on: all other characters take bytes."""

BOS, EOS, TOOL = "<|begin|>", "<|end|>", "<tool>"


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE that puts a begin token first, like Llama 3's. `<tool>` is an added token but not special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BOS, EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(TOOL, normalized=False), AddedToken("日本", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def _byte_fallback_bpe() -> tokenizers.Tokenizer:
    """BPE over `▁` words with 256 byte tokens for what it cannot spell, in the order of Llama 2's vocabulary."""
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        show_progress=False,
    )
    trained.train_from_iterator(SPELLED, trainer)
    state = json.loads(trained.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = state["added_tokens"][:3]
    state["pre_tokenizer"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def llama_2() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral: a space before the text when encoding, and none when decoding."""
    tokenizer = _byte_fallback_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def gemma() -> tokenizers.Tokenizer:
    """As Gemma: spaces are spelled `▁` and nothing is added or removed."""
    tokenizer = _byte_fallback_bpe()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """A Unigram vocabulary with Metaspace on both sides, as T5's."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """WordPiece, whose decoder puts spaces between words and takes them away before punctuation."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_level() -> tokenizers.Tokenizer:
    """Whole words, no decoder at all, and an id that no token has."""
    words = ["[UNK]", "[END]", "the", "quick", "brown", "fox", "", "日本"]
    vocabulary = {word: index for index, word in enumerate(words)} | {"gap": len(words) + 1}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[END]"])
    return tokenizer


def suffix_bpe() -> tokenizers.Tokenizer:
    """BPE that marks the ends of words, whose decoder treats the last token differently (GPT-1, CLIP)."""
    vocabulary = {"lo": 0, "w</w>": 1, "er</w>": 2, "n": 3, "e": 4, "<end>": 5}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


BUILDERS = {
    builder.__name__: builder for builder in (byte_level, llama_2, gemma, unigram, word_piece, word_level, suffix_bpe)
}
"""Every kind by name."""


@functools.cache
def vocabulary(kind: str) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """The tokenizer of the library, which is the oracle, and ours on a copy of it."""
    oracle = BUILDERS[kind]()
    return oracle, Tokenizer(tokenizers.Tokenizer.from_str(oracle.to_str()))


def metadata_of(backend: tokenizers.Tokenizer, *, model: str, **extra: Any) -> dict[str, Any]:
    """A vocabulary as converters write it into a GGUF file."""
    state = json.loads(backend.to_str())
    ids = backend.get_vocab(with_added_tokens=True)
    added = {token["id"]: token for token in state["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    types = [
        (TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED) if i in added else TokenType.NORMAL
        for i in range(len(tokens))
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([int(kind) for kind in types], np.int32),
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }
