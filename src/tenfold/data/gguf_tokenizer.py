"""The tokenizer in a GGUF file's metadata, rebuilt with the `tokenizers` library.

Two kinds of vocabulary are read (`tokenizer.ggml.model`):

- `gpt2`: byte-level BPE, with its merges. How text is split into words before them is only named
  (`tokenizer.ggml.pre`). `SPLITTERS` has what each name stands for, as the model that it was made for publishes it in
  its `tokenizer.json`.
- `llama`: SentencePiece BPE. It has scores instead of merges: of all neighbours whose concatenation is in the
  vocabulary, those with the highest score are joined first. Merges in the order of scores do the same (Kudo and
  Richardson, 2018).

A file that carries the whole `tokenizer.json` (`tokenizer.huggingface.json`) is taken at its word.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from tenfold.base.errors import TokenizerError
from tenfold.data.tokenizer import Tokenizer
from tenfold.data.tokenizer_files import DEFAULT_TEMPLATE, choose_chat_template


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """How byte-level BPE splits text before it merges.

    Attributes:
        patterns: each splits what those before it have left whole, into its matches and what is between them.
        composed: text is put into Unicode's normal form C first.
        add_bos: whether a sequence begins with the begin token where the file does not say so.
        whole_words: a word that is a token is that token, whatever the merges make of it.
    """

    patterns: tuple[str, ...]
    composed: bool = False
    add_bos: bool = False
    whole_words: bool = False


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN_2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_META_LLAMA_3 = Splitter(patterns=(_LLAMA_3,), add_bos=True, whole_words=True)
_DIGITS = Splitter(patterns=(r"\p{N}", _GPT_2))

SPLITTERS = {
    "default": Splitter(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Splitter(patterns=(_GPT_2,)),
    "phi-2": Splitter(patterns=(_GPT_2,)),
    "olmo": Splitter(patterns=(_GPT_2,), composed=True),
    "llama-bpe": _META_LLAMA_3,
    "llama3": _META_LLAMA_3,
    "llama-v3": _META_LLAMA_3,
    "smaug-bpe": Splitter(patterns=(_LLAMA_3,), whole_words=True),  # Llama 3's without a begin token: SmolLM3
    "dbrx": Splitter(patterns=(_LLAMA_3,)),  # cl100k: OLMo 2, Phi-4
    "qwen2": Splitter(patterns=(_QWEN_2,), composed=True),
    "deepseek-r1-qwen": Splitter(patterns=(_QWEN_2,), composed=True),
    "ufakzeka": Splitter(patterns=(rf"{_WORDS}|\p{{N}}|{_REST}",)),  # Qwen 2's without contractions: pico
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,  # Granite's code models
    "tekken": Splitter(
        patterns=(rf"{_CASED % ('', '')}|\p{{N}}|{_CASED_REST}",), add_bos=True, whole_words=True
    ),  # Mistral NeMo
    "gpt-4o": Splitter(  # Phi-4 mini
        patterns=(rf"{_CASED % (f'{_CONTRACTIONS}?', f'{_CONTRACTIONS}?')}|\p{{N}}{{1,3}}|{_CASED_REST}",)
    ),
}
"""What the values of `tokenizer.ggml.pre` stand for."""

_NAMED_TOKENS = {
    "bos_token": ("bos_token_id",),
    "eos_token": ("eos_token_id",),
    "unk_token": ("unknown_token_id",),
    "sep_token": ("seperator_token_id", "separator_token_id"),  # the first is how files have it, the second the spec
    "pad_token": ("padding_token_id",),
    "mask_token": ("mask_token_id",),
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_NAMES = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>")
)
_MAX_PIECE = 1000


@dataclass(frozen=True, kw_only=True)
class GGUFTokenizer:
    """What a file says about its tokenizer.

    Attributes:
        backend: the vocabulary, and which special tokens are put around a sequence.
        special_tokens: by the name that chat templates know them by ("bos_token", ...).
        chat_templates: Jinja sources by name.
        end_token_ids: tokens that end an answer: the end of the text, of a turn, of a message.
        add_bos: whether a sequence begins with the begin token.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    end_token_ids: tuple[int, ...]
    add_bos: bool

    def tokenizer(self, *, chat_template: str | None = None) -> Tokenizer:
        """The tokenizer that serves requests. `chat_template` is as in `Tokenizer.load`."""
        templates = self.chat_templates
        if chat_template is not None:
            templates = {DEFAULT_TEMPLATE: choose_chat_template(chat_template, templates)}
        return Tokenizer(self.backend, special_tokens=self.special_tokens, chat_templates=templates)


def build_tokenizer(metadata: Mapping[str, Any]) -> GGUFTokenizer:
    """Rebuild the tokenizer of a GGUF file.

    Args:
        metadata: by key, as `tenfold.base.gguf` reads them: arrays may be of any kind that can be iterated.

    Raises:
        TokenizerError: there is none, or it is damaged, or of a kind that is not implemented; names key and value.
    """
    read = _Metadata(metadata)
    if "tokenizer.huggingface.json" in metadata:
        backend = _parse(read.text("tokenizer.huggingface.json"))
        vocabulary = _vocabulary_of(backend)
        bos = read.token(["bos_token_id"], vocabulary)
        add_bos = bos is not None and bos in backend.encode("").tokens
    else:
        model = read.text("tokenizer.ggml.model")
        builders = {"gpt2": _byte_level, "llama": _sentence_piece}
        if model not in builders:
            raise TokenizerError(
                f"the GGUF file has a tokenizer of the kind {model!r}, which is not implemented; known are "
                f"{', '.join(builders)}. Give another tokenizer with --tokenizer"
            )
        vocabulary = _read_vocabulary(read)
        backend, add_bos = _build(builders[model], read, vocabulary)
    named = {name: read.token(keys, vocabulary) for name, keys in _NAMED_TOKENS.items()}
    return GGUFTokenizer(
        backend=backend,
        special_tokens={name: token for name, token in named.items() if token is not None},
        chat_templates=_chat_templates(read),
        end_token_ids=_end_tokens(read, vocabulary),
        add_bos=add_bos,
    )


def read_end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer, as in `GGUFTokenizer`, without building the rest.

    Raises:
        TokenizerError: as `build_tokenizer`.
    """
    read = _Metadata(metadata)
    if "tokenizer.huggingface.json" in metadata:
        return _end_tokens(read, _vocabulary_of(_parse(read.text("tokenizer.huggingface.json"))))
    return _end_tokens(read, _read_vocabulary(read))


# --- metadata -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Vocabulary:
    """Tokens and their types by id, and ids by token. Ids without a token are left out."""

    tokens: Mapping[int, str]
    types: Mapping[int, int]
    ids: Mapping[str, int]

    def of_type(self, *types: TokenType) -> list[int]:
        """The ids of tokens of some types, in order."""
        return [index for index, kind in self.types.items() if kind in types]


class _Metadata:
    """Reads values of an expected type."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def text(self, key: str) -> str:
        """A string that must be there."""
        value = self._metadata.get(key)
        if not isinstance(value, str):
            raise TokenizerError(
                f"the GGUF file has no text under {key}, which its tokenizer needs; give another with --tokenizer"
            )
        return value

    def optional_text(self, key: str) -> str | None:
        """A string, if it is there."""
        return self.text(key) if key in self._metadata else None

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise TokenizerError(f"the GGUF file has tokenizer.ggml.{key} = {value!r:.80}, which is not a boolean")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty if it is not there."""
        value = self._metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in cast("list[Any]", value)):
            raise TokenizerError(f"the GGUF file has a {key} that is not a list of strings; download it again")
        return cast("list[str]", value)

    def numbers(self, key: str, count: int) -> list[float] | None:
        """As many numbers as there are tokens, if they are there."""
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return None
        try:
            numbers = [float(item) for item in value]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise TokenizerError(f"the GGUF file has a tokenizer.ggml.{key} that is not {count} numbers, one per token")
        return numbers

    def token(self, keys: Iterable[str], vocabulary: _Vocabulary) -> str | None:
        """The token whose id stands under one of some keys."""
        for key in keys:
            index = self._metadata.get(f"tokenizer.ggml.{key}")
            if index is not None:
                if type(index) is not int or index not in vocabulary.tokens:
                    raise TokenizerError(f"the GGUF file has tokenizer.ggml.{key} = {index!r:.80}, which no token has")
                return vocabulary.tokens[index]
        return None


def _read_vocabulary(read: _Metadata) -> _Vocabulary:
    """The tokens of the file. Those that only pad the embedding, `[PAD123]`, are left out."""
    listed = read.texts("tokenizer.ggml.tokens")
    if not listed:
        raise TokenizerError(
            "the GGUF file has no tokens under tokenizer.ggml.tokens; give a tokenizer with --tokenizer"
        )
    kinds = read.numbers("token_type", len(listed))
    types = [TokenType.NORMAL] * len(listed) if kinds is None else [int(kind) for kind in kinds]
    tokens = {
        index: token
        for index, token in enumerate(listed)
        if token and not (types[index] == TokenType.UNUSED and token == f"[PAD{index}]")
    }
    ids = {token: index for index, token in tokens.items()}
    if len(ids) < len(tokens):
        twice, _ = Counter(tokens.values()).most_common(1)[0]
        raise TokenizerError(f"the GGUF file's vocabulary has the token {twice!r:.80} twice; download it again")
    vocabulary = _Vocabulary(tokens, {index: types[index] for index in tokens}, ids)
    if kinds is not None:
        return vocabulary
    named = {ids[token] for keys in _NAMED_TOKENS.values() if (token := read.token(keys, vocabulary)) is not None}
    return _Vocabulary(tokens, {i: TokenType.CONTROL if i in named else TokenType.NORMAL for i in tokens}, ids)


def _vocabulary_of(backend: tokenizers.Tokenizer) -> _Vocabulary:
    ids = backend.get_vocab(with_added_tokens=True)
    special = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    types = {index: TokenType.CONTROL if index in special else TokenType.NORMAL for index in ids.values()}
    return _Vocabulary({index: token for token, index in ids.items()}, types, ids)


def _chat_templates(read: _Metadata) -> dict[str, str]:
    """Templates by name. The default one has no name; the others are listed."""
    names = read.texts("tokenizer.chat_templates")
    found = {name: read.text(f"tokenizer.chat_template.{name}") for name in names if name != DEFAULT_TEMPLATE}
    default = read.optional_text("tokenizer.chat_template")
    return found if default is None else {DEFAULT_TEMPLATE: default} | found


def _end_tokens(read: _Metadata, vocabulary: _Vocabulary) -> tuple[int, ...]:
    """The ids under the keys for ends, and special tokens that are called like one, which many files do not list."""
    listed = [read.token([key], vocabulary) for key in _END_KEYS]
    named = _END_NAMES & {vocabulary.tokens[index] for index in vocabulary.of_type(TokenType.CONTROL)}
    first = [vocabulary.ids[token] for token in listed if token is not None]
    return tuple(dict.fromkeys([*first, *sorted(vocabulary.ids[token] for token in named)]))


# --- vocabularies ---------------------------------------------------------------------------------------------------


def _parse(content: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises a bare Exception, whatever the damage
        raise TokenizerError(f"the GGUF file's tokenizer.huggingface.json cannot be read: {error}") from error


def _build(builder: Any, read: _Metadata, vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """The vocabulary with its special tokens, and whether it begins a sequence with one."""
    try:
        backend, default = builder(read, vocabulary)
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception, for one for a merge of unknown tokens
        raise TokenizerError(f"the GGUF file's vocabulary is damaged: {error}") from error
    _add_tokens(backend, read, vocabulary)
    add_bos = read.flag("add_bos_token", default)
    add_eos = read.flag("add_eos_token", False)
    _surround(
        backend,
        bos=read.token(["bos_token_id"], vocabulary) if add_bos else None,
        eos=read.token(["eos_token_id"], vocabulary) if add_eos else None,
        missing=[f"add_{name}_token" for name, wanted in (("bos", add_bos), ("eos", add_eos)) if wanted],
    )
    return backend, add_bos


def _byte_level(read: _Metadata, vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    pre = read.optional_text("tokenizer.ggml.pre") or "default"
    if pre not in SPLITTERS:
        raise TokenizerError(
            f"the GGUF file splits text as {pre!r} (tokenizer.ggml.pre), which is not implemented; known are "
            f"{', '.join(SPLITTERS)}. Give the model's own tokenizer with --tokenizer"
        )
    splitter = SPLITTERS[pre]
    merges: list[tuple[str, str]] = []
    for merge in read.texts("tokenizer.ggml.merges"):
        at = merge.find(" ", 1)
        if at < 0:
            raise TokenizerError(f"the GGUF file has the merge {merge!r:.80}, which is not a pair; download it again")
        merges.append((merge[:at], merge[at + 1 :]))
    backend = tokenizers.Tokenizer(models.BPE(dict(vocabulary.ids), merges, ignore_merges=splitter.whole_words))
    if splitter.composed:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitter.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend, splitter.add_bos


def _sentence_piece(read: _Metadata, vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    unknown = read.token(["unknown_token_id"], vocabulary)
    if unknown is None:
        unknown = next((vocabulary.tokens[index] for index in vocabulary.of_type(TokenType.UNKNOWN)), None)
    ids = dict(vocabulary.ids)
    merges = _merges_by_score(vocabulary, read.numbers("scores", len(read.texts("tokenizer.ggml.tokens"))))
    backend = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback="<0x00>" in ids)
    )
    spaces = normalizers.Replace(" ", "▁")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if read.flag("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _merges_by_score(vocabulary: _Vocabulary, scores: Sequence[float] | None) -> list[tuple[str, str]]:
    """Every way to join two tokens to a third, best score first; equal scores in the order of ids."""
    normal = vocabulary.of_type(TokenType.NORMAL)
    if scores is not None:
        normal.sort(key=lambda index: -scores[index])
    ranks = {vocabulary.tokens[index]: index for index in normal}
    merges: list[tuple[str, str]] = []
    for piece, index in ranks.items():
        if len(piece) > _MAX_PIECE:
            raise TokenizerError(f"the GGUF file's token {index} has {len(piece)} characters; download it again")
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in ranks]
        merges += sorted((s for s in splits if s[1] in ranks), key=lambda split: (ranks[split[0]], ranks[split[1]]))
    return merges


def _add_tokens(backend: tokenizers.Tokenizer, read: _Metadata, vocabulary: _Vocabulary) -> None:
    """Declares the tokens that text is searched for before anything else.

    Phi-3's, but for the three named here, swallow the space behind them. Its `tokenizer.json` says so, GGUF cannot.
    """
    phi_3 = read.text("tokenizer.ggml.model") == "llama" and read.optional_text("general.architecture") == "phi3"
    added = [
        AddedToken(
            token := vocabulary.tokens[index],
            normalized=False,
            special=vocabulary.types[index] != TokenType.USER_DEFINED,
            rstrip=phi_3 and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for index in vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    ]
    backend.add_tokens(added)  # pyright: ignore[reportUnknownMemberType] - a bare list in its stub


def _surround(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None, missing: Sequence[str]) -> None:
    if len(missing) > (bos is not None) + (eos is not None):
        raise TokenizerError(f"the GGUF file sets {' and '.join(missing)} without the id of the token to add")
    around = [token for token in (bos, eos) if token is not None]
    if around:
        first, last = ([bos] if bos else []), ([eos] if eos else [])
        backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B", *last],
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(around)],
        )
