"""A checkpoint's tokenizer: text to ids and back, a token-by-token view for logprobs, and its chat templates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from tenfold.base.errors import TokenizerError
from tenfold.data.chat import ChatTemplate
from tenfold.data.decoder import TokenDecoder
from tenfold.data.tokenizer_files import (
    DEFAULT_TEMPLATE,
    choose_chat_template,
    convert_backend,
    load_backend,
    read_tokenizer_files,
)

_TOOL_TEMPLATE = "tool_use"


class _Token(NamedTuple):
    piece: str
    data: bytes
    special: bool


class Tokenizer:
    """Text to token ids and back. Never changes after construction: safe to use from many threads at once.

    Args:
        backend: the vocabulary. It becomes this object's own: padding and truncation are switched off.
        special_tokens: contents of special tokens by name, such as `{"eos_token": "</s>"}`.
        chat_templates: Jinja sources by name; "default" is used, or "tool_use" where there are tools and it exists.

    Attributes:
        decoder: how this vocabulary's tokens become text.
        special_tokens: as given.
        vocab_size: one more than the largest token id. A model's output layer may be padded past it.
        bos_token_id, eos_token_id, pad_token_id: ids of the special tokens of these names, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.decoder = TokenDecoder(backend.decoder)
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = backend.get_added_tokens_decoder().values()
        self._special_pieces = frozenset(token.content for token in added if token.special)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.pad_token_id = self._special_id("pad_token")
        self._template_sources = dict(chat_templates or {})
        # Both caches fill on demand. Two threads may build the same entry, and either result is right.
        self._templates: dict[str, ChatTemplate] = {}
        self._tokens: dict[int, _Token] = {}

    @classmethod
    def load(cls, path: Path, *, chat_template: str | None = None) -> "Tokenizer":
        """Load from a local checkpoint directory in Hugging Face format (`tokenizer_files` says what counts).

        Without a `tokenizer.json` the vocabulary is converted by transformers, which the extra `tenfold[hf]` installs.

        Args:
            path: the directory.
            chat_template: template to use instead of the checkpoint's: Jinja source, the name of one of the
                checkpoint's templates, or the path of a file that holds the source.

        Raises:
            TokenizerError: a file is missing or damaged, or the chosen chat template does not compile.
        """
        if not path.is_dir():
            raise TokenizerError(f"{path} is not a directory; give a checkpoint directory in Hugging Face format")
        files = read_tokenizer_files(path)
        special_tokens = {name: token.content for name, token in files.special_tokens.items()}
        if (path / "tokenizer.json").is_file():
            backend = load_backend(path, files)
        else:
            backend, known = convert_backend(path)
            special_tokens = known | special_tokens
        if chat_template is None:
            return cls(backend, special_tokens=special_tokens, chat_templates=files.chat_templates)
        chosen = {DEFAULT_TEMPLATE: choose_chat_template(chat_template, files.chat_templates)}
        tokenizer = cls(backend, special_tokens=special_tokens, chat_templates=chosen)
        tokenizer._template(DEFAULT_TEMPLATE)
        return tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of the text, with the special tokens that `tokenizer.json` puts around a sequence if asked to.

        Text from `apply_chat_template` has its special tokens already: encode it without adding any.

        Raises:
            TokenizerError: the text is not valid Unicode, or the vocabulary cannot spell it.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for each text, in parallel."""
        for text in texts:
            _check_unicode(text)
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except Exception as error:  # a bare Exception: for one, no unknown token for a character that is not known
            raise TokenizerError(f"the vocabulary cannot spell this text: {error}") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence of ids. Invalid UTF-8 becomes U+FFFD.

        Raises:
            TokenizerError: an id that the vocabulary does not have.
        """
        pieces: list[str] = []
        for token_id in ids:
            token = self._token(token_id)
            if token is None:
                raise TokenizerError(
                    f"token id {token_id} is not in the vocabulary, whose largest id is {self.vocab_size - 1}"
                )
            if not (skip_special_tokens and token.special):
                pieces.append(token.piece)
        return self.decoder.text(pieces)

    def piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it ("Ġthe", "▁the", "<0x0A>"), or None if it has no such id."""
        token = self._token(token_id)
        return None if token is None else token.piece

    def token(self, token_id: int) -> str:
        """The text that the token adds within a text (" the"), with U+FFFD for parts of characters.

        A special token adds its own name. "" if the vocabulary has no such id (see `vocab_size`).
        """
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of what the token adds within a text; they may be part of a character.

        A special token adds its own name. b"" if the vocabulary has no such id (see `vocab_size`).
        """
        token = self._token(token_id)
        return b"" if token is None else token.data

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out by default."""
        token = self._token(token_id)
        return token is not None and token.special

    def encode_at(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of the text, without special tokens around it, and the character where each one begins.

        Raises:
            TokenizerError: as `encode`.
        """
        _check_unicode(text)
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # as in `encode_batch`
            raise TokenizerError(f"the vocabulary cannot spell this text: {error}") from error
        return encoding.ids, [start for start, _ in encoding.offsets]

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` has a template to apply."""
        return bool(self._template_sources)

    @property
    def marks_answers(self) -> bool:
        """Whether the template says by `{% generation %}` what the model writes."""
        return self._template(self._template_name(None)).marks_answers

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        mark_answers: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation as text. Encode it with `add_special_tokens=False`.

        Args:
            messages: the conversation, in the shape of OpenAI's chat API (see `ChatTemplate.render`).
            add_generation_prompt: end with the beginning of an assistant message.
            continue_final_message: leave the last message open for the model to continue; excludes the former.
            mark_answers: mark what the template says that the model writes (see `ChatTemplate.render`).
            tools: JSON schemas of the tools that the model may call.
            kwargs: further variables for the template, such as `enable_thinking`. They win over the special tokens.

        Raises:
            TokenizerError: there is no template, or it is damaged, or it refuses the messages.
        """
        return self._template(self._template_name(tools)).render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            mark_answers=mark_answers,
            tools=tools,
            variables={**self.special_tokens, **kwargs},
        )

    def _token(self, token_id: int) -> _Token | None:
        token = self._tokens.get(token_id)
        if token is None and 0 <= token_id < self.vocab_size:
            piece = self._backend.id_to_token(token_id)
            if piece is not None:
                token = _Token(piece, self.decoder.token_bytes(piece), piece in self._special_pieces)
                self._tokens[token_id] = token
        return token

    def _special_id(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        return None if content is None else self._backend.token_to_id(content)

    def _template_name(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        sources = self._template_sources
        if tools and _TOOL_TEMPLATE in sources:
            return _TOOL_TEMPLATE
        if DEFAULT_TEMPLATE in sources:
            return DEFAULT_TEMPLATE
        if not sources:
            raise TokenizerError(
                "this model has no chat template; start the server with --chat-template, or use plain completions"
            )
        raise TokenizerError(
            f"this model has the chat templates {sorted(sources)} and none is the default; choose one when loading it"
        )

    def _template(self, name: str) -> ChatTemplate:
        template = self._templates.get(name)
        if template is None:
            template = self._templates[name] = ChatTemplate(self._template_sources[name])
        return template


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, which is not "
            "valid Unicode; remove it or send the character's whole pair"
        ) from error
