"""How token strings become text: which tokens stand for raw bytes, and what each adds to the whole.

A `tokenizer.json` names a chain of decoding steps that sees all tokens of a sequence at once. To decode a
stream exactly, one must know which part of the chain's output can still change. The chain's declaration tells:

- `BYTES` (ByteLevel: GPT-2, Llama 3, Qwen, OLMo): each token is a byte string, and the text is the UTF-8 decoding of
  all of them end to end.
- `PIECES` (the SentencePiece style of Llama 2, Mistral, Gemma and Phi-3; WordPiece; no decoder at all): each token is a
  piece of text that depends on nothing but whether it is the first, except that consecutive `<0xNN>` tokens form one
  byte run, which `ByteRun` decodes.
- `WHOLE`: anything else. Nothing is final until the last token is known.
"""

import codecs
import json
from collections.abc import Sequence
from enum import Enum
from itertools import groupby
from string import hexdigits
from typing import Any

from tokenizers.decoders import Decoder

REPLACEMENT = "\ufffd"
"""What invalid UTF-8 decodes to."""

MAX_OPEN_RUN = 64
"""Bytes of one byte run after which the next character boundary ends it (see `ByteRun`)."""

_ANCHOR = "a"
"""A token that every supported decoder copies unchanged; a token decoded behind it is not the first."""


class DecoderKind(Enum):
    """What a stream may assume about a decoder; see the module's docstring."""

    BYTES = "bytes"
    PIECES = "pieces"
    WHOLE = "whole"


def _byte_alphabet() -> dict[str, int]:
    """The characters that GPT-2's byte-level BPE writes for the 256 bytes (openai/gpt-2, `bytes_to_unicode`).

    Printable Latin-1 bytes stand for themselves; the others, in order, are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


_BYTE_TOKENS = {f"<0x{high}{low}>": int(high + low, 16) for high in hexdigits for low in hexdigits}
"""The bytes that byte-fallback tokens such as `<0x0A>` stand for."""


class ByteRun:
    """The consecutive byte tokens that are open at one place of a sequence, decoded as far as they are final.

    The ByteFallback decoder gives a run's characters if the whole run is valid UTF-8, and one U+FFFD per byte if it is
    not. So a byte that breaks a run decides the run at once, and a valid one stays open until it ends. To let text
    in a script that is all bytes flow, and to bound what is held, a run of `MAX_OPEN_RUN` bytes ends by
    definition at the next character boundary, and the bytes after it are a new run.
    """

    def __init__(self) -> None:
        self.broken = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._text = ""
        self._count = 0

    def push(self, byte: int) -> str:
        """Add a byte and return the text that it makes final."""
        if self.broken:
            return REPLACEMENT
        self._count += 1
        try:
            self._text += self._utf8.decode(bytes((byte,)))
        except UnicodeDecodeError:
            self.broken = True
            return REPLACEMENT * self._count
        return self.end() if self._count >= MAX_OPEN_RUN and self._complete() else ""

    def peek(self) -> str:
        """The open text as it would be if the run ended here."""
        if self.broken:
            return ""
        return self._text if self._complete() else REPLACEMENT * self._count

    def end(self) -> str:
        """End the run, return its open text, and start afresh."""
        text = self.peek()
        if self._count:
            self.broken, self._text, self._count = False, "", 0
            self._utf8.reset()
        return text

    def _complete(self) -> bool:
        return not self._utf8.getstate()[0]


class TokenDecoder:
    """Turns the token strings of one vocabulary into text and bytes. Immutable, so safe to share between threads.

    Attributes:
        kind: what holds for every sequence of tokens.
        positional: the first token of a sequence decodes differently (`first_piece`) from the same token later.
        strip: `(character, count)`: up to `count` leading characters are removed from the text as a whole.
    """

    def __init__(self, decoder: Decoder | None) -> None:
        self._decoder = decoder
        steps = _steps(decoder)
        types = [step["type"] for step in steps]
        self.positional = decoder is None or "Metaspace" in types or "WordPiece" in types
        self.strip = ("", 0)
        self.kind = DecoderKind.WHOLE
        self._has_byte_runs = False
        if types == ["ByteLevel"]:
            self.kind = DecoderKind.BYTES
        elif _is_piecewise(steps) and self._join([_ANCHOR]) == _ANCHOR:
            self.kind = DecoderKind.PIECES
            self._has_byte_runs = "ByteFallback" in types
            if "Fuse" in types and types[-1] == "Strip":
                self.strip = (steps[-1]["content"], steps[-1]["start"])

    def text(self, tokens: Sequence[str]) -> str:
        """Decode a whole sequence.

        Equal to `tokenizers.Tokenizer.decode` of the same tokens, except where `ByteRun` ends a long run by definition.
        """
        return self._join(_end_long_runs(tokens) if self._has_byte_runs else tokens)

    def byte(self, token: str) -> int | None:
        """The byte that the token adds to a byte run, or None if it is not part of one."""
        return _BYTE_TOKENS.get(token) if self._has_byte_runs else None

    def first_piece(self, token: str) -> str:
        """The text of a token that is no byte and starts a sequence, before `strip`. For `PIECES` only."""
        return self._join([token]) if self.positional else self.piece(token)

    def piece(self, token: str) -> str:
        """What a token that is no byte adds to the text anywhere but at its start. For `PIECES` only."""
        return self._join([_ANCHOR, token])[len(_ANCHOR) :]

    def token_bytes(self, token: str) -> bytes:
        """The UTF-8 that a token adds to a text that already has a beginning; may be part of a character."""
        if self.kind is DecoderKind.BYTES:
            mapped = [_BYTE_ALPHABET.get(char) for char in token]
            known = [byte for byte in mapped if byte is not None]
            # A token with any character from outside the alphabet (an added token, often) stands for its own text.
            return bytes(known) if len(known) == len(mapped) else token.encode()
        if self.kind is DecoderKind.WHOLE:
            return self._join([token]).encode()
        byte = self.byte(token)
        return self.piece(token).encode() if byte is None else bytes((byte,))

    def _join(self, tokens: Sequence[str]) -> str:
        if self._decoder is None:
            return " ".join(tokens)
        return self._decoder.decode(list(tokens))


def _steps(decoder: Decoder | None) -> list[dict[str, Any]]:
    """The decoder's steps as `tokenizer.json` declares them, nested sequences flattened."""
    if decoder is None:
        return []

    def flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
        if step["type"] != "Sequence":
            return [step]
        return [inner for outer in step["decoders"] for inner in flatten(outer)]

    return flatten(json.loads(decoder.__getstate__()))


def _is_piecewise(steps: Sequence[dict[str, Any]]) -> bool:
    """Whether every step works token by token, apart from byte runs, the first token and a final leading strip."""
    types = [step["type"] for step in steps]
    fused = types.index("Fuse") if "Fuse" in types else len(types)
    head, tail = types[:fused], steps[fused + 1 :]
    if "ByteFallback" in head:
        # A step after it would see a byte run as one token, and WordPiece before it would hide the byte tokens.
        if head[-1] != "ByteFallback" or head.count("ByteFallback") > 1 or "WordPiece" in head:
            return False
        head = head[:-1]
    if not set(head) <= {"Replace", "Metaspace", "WordPiece", "Strip"}:
        return False
    if not tail:
        return True
    positional = "Metaspace" in head or "WordPiece" in head
    return len(tail) == 1 and tail[0]["type"] == "Strip" and tail[0]["stop"] == 0 and not positional


def _end_long_runs(tokens: Sequence[str]) -> list[str]:
    """Insert an empty token, which ends a byte run and adds no text, wherever `ByteRun` ends a run by definition."""
    ended: list[str] = []
    for is_byte, group in groupby(tokens, key=_BYTE_TOKENS.__contains__):
        stretch = list(group)
        if not is_byte or len(stretch) < MAX_OPEN_RUN:
            ended += stretch
            continue
        run = ByteRun()
        for token in stretch:
            ended.append(token)
            if run.push(_BYTE_TOKENS[token]) and not run.broken:
                ended.append("")
    return ended
