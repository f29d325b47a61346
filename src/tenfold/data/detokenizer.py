"""Text as it is generated: incremental decoding of token ids, and stop strings.

`Detokenizer` turns the ids of one generated sequence into text piece by piece; the pieces, end to end, are exactly the
decoding of the whole (its docstring has the definition). `StopStrings` finds stop strings across the pieces.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from tenfold.base.errors import RequestError
from tenfold.data.decoder import ByteRun, DecoderKind
from tenfold.data.tokenizer import Tokenizer

_MAX_UTF8_BYTES = 4


class _Stream(ABC):
    """Incremental decoding of one sequence: the prompt's visible ids once, then the generated ones."""

    @abstractmethod
    def resume(self, prompt_ids: Sequence[int]) -> None:
        """Take the state that the prompt leaves behind. Called once, before any `push`."""

    @abstractmethod
    def push(self, token_ids: Iterable[int]) -> str:
        """Add generated ids and return the text that has become final."""

    @abstractmethod
    def peek(self) -> str:
        """The text that is held back, as it would be if the sequence ended here. Does not change the state."""


class Detokenizer:
    """Incremental detokenisation of one generated sequence.

    Let D be `Tokenizer.decode` with the same `skip_special_tokens`, P the prompt's ids and G the generated ones. The
    pieces that `push` and `finish` return, joined, are `D(P + G)` without the longest prefix that it shares with
    `D(P)`. That is:

    - with no prompt (or one of special tokens that are skipped), `D(G)`;
    - after a prompt, the first generated word keeps the space that separates it from the prompt, which a SentencePiece
      decoder removes at the start of a text;
    - if the prompt ends within a character, the whole character belongs to the generated text.

    A piece never ends within a character, and is never taken back: a U+FFFD comes out only where no later token could
    change it. Text is held back only while it can still change: the up to three bytes of an unfinished character,
    or an open byte run (at most `decoder.MAX_OPEN_RUN` bytes and an unfinished character). Work per token does not grow
    with the sequence. The exception is a tokenizer whose decoder needs the end of the sequence to decode its
    beginning (`DecoderKind.WHOLE`; no known language model has one): its text all comes from `finish`.

    Ids that the vocabulary does not name add nothing, where `decode` refuses them: a model's output layer is
    often padded past its vocabulary, and such an id must not end a request.

    Args:
        tokenizer: the vocabulary.
        skip_special_tokens: leave special tokens out of the text.
        prompt_token_ids: ids before the first generated one. Only its ends are read: cost does not grow with it, unless
            the prompt is all bytes or special tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = _open_stream(tokenizer, skip_special_tokens)
        self._stream.resume(prompt_token_ids)
        # What D(P) already shows of the text that the stream still holds.
        self._shown = self._stream.peek()

    def push(self, token_ids: Sequence[int]) -> str:
        """Add generated ids, in order, and return the text that they make final (often "")."""
        return self._emit(self._stream.push(token_ids))

    def finish(self) -> str:
        """End the sequence and return the text that was held back. The detokeniser is then spent."""
        text = self._emit(self._stream.peek())
        self._stream = _open_stream(self._tokenizer, self._skip)
        return text

    def _emit(self, text: str) -> str:
        if not self._shown or not text:
            return text
        shared = _common_prefix(self._shown, text)
        self._shown = self._shown[shared:] if shared == len(text) else ""
        return text[shared:]


def _open_stream(tokenizer: Tokenizer, skip_special_tokens: bool) -> _Stream:
    match tokenizer.decoder.kind:
        case DecoderKind.BYTES:
            return _ByteStream(tokenizer, skip_special_tokens)
        case DecoderKind.PIECES:
            return _PieceStream(tokenizer, skip_special_tokens)
        case DecoderKind.WHOLE:
            return _WholeStream(tokenizer, skip_special_tokens)


def _common_prefix(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


class _ByteStream(_Stream):
    """Decoding where every token is a byte string: UTF-8 end to end, U+FFFD per maximal invalid part."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def resume(self, prompt_ids: Sequence[int]) -> None:
        tail = b""
        for token_id in reversed(prompt_ids):
            if len(tail) >= _MAX_UTF8_BYTES:
                break
            tail = self._bytes(token_id) + tail
        # The first suffix that decodes to nothing yet is the unfinished character, if there is one.
        for start in range(max(0, len(tail) - _MAX_UTF8_BYTES + 1), len(tail)):
            if not self._utf8.decode(tail[start:]):
                return
            self._utf8.reset()

    def push(self, token_ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes, token_ids)))

    def peek(self) -> str:
        return self._utf8.getstate()[0].decode("utf-8", "replace")

    def _bytes(self, token_id: int) -> bytes:
        if self._skip and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id)


class _PieceStream(_Stream):
    """Decoding piece by piece, with byte runs, an odd first token and leading characters to strip."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder
        self._skip = skip_special_tokens
        self._run = ByteRun()
        self._first = True
        self._strip_char, self._strip_left = self._decoder.strip

    def resume(self, prompt_ids: Sequence[int]) -> None:
        start = 0
        while start < len(prompt_ids) and (self._first or self._strip_left):
            self.push(prompt_ids[start : start + 1])
            start += 1
        # Of the rest, only the byte run at the end, if there is one, is still open.
        run_start = len(prompt_ids)
        for index in range(len(prompt_ids) - 1, start - 1, -1):
            token = self._visible(prompt_ids[index])
            if token is not None and self._decoder.byte(token) is None:
                self._run = ByteRun()
                break
            run_start = index
        self.push(prompt_ids[run_start:])

    def push(self, token_ids: Iterable[int]) -> str:
        text = ""
        for token_id in token_ids:
            token = self._visible(token_id)
            if token is None:
                continue
            byte = self._decoder.byte(token)
            if byte is not None:
                text += self._run.push(byte)
            elif self._first:
                text += self._decoder.first_piece(token)
            else:
                text += self._run.end() + self._tokenizer.token_bytes(token_id).decode()
            self._first = False
        text, self._strip_left = self._stripped(text)
        return text

    def peek(self) -> str:
        return self._stripped(self._run.peek())[0]

    def _visible(self, token_id: int) -> str | None:
        if self._skip and self._tokenizer.is_special(token_id):
            return None
        return self._tokenizer.piece(token_id)

    def _stripped(self, text: str) -> tuple[str, int]:
        """The text without the leading characters that are still to be stripped, and how many are left to strip."""
        left = self._strip_left
        if not left or not text:
            return text, left
        while left and text.startswith(self._strip_char):
            text, left = text[len(self._strip_char) :], left - 1
        return text, left if not text else 0


class _WholeStream(_Stream):
    """Decoding that shows nothing before the end, for decoders about which nothing is known."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []

    def resume(self, prompt_ids: Sequence[int]) -> None:
        self.push(prompt_ids)

    def push(self, token_ids: Iterable[int]) -> str:
        self._ids += [token_id for token_id in token_ids if self._tokenizer.piece(token_id) is not None]
        return ""

    def peek(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)


class StopStrings:
    """Finds the first stop string in text that arrives in pieces.

    The match that starts earliest in the whole text wins, and of two that start together the shorter; how the text is
    cut into pieces makes no difference. So a match waits while a stop string that starts before it could still be
    completed. What is held back is always the beginning of a stop string, and shorter than the longest of them. Work is
    linear in the text (Knuth, Morris and Pratt, 1977).

    Args:
        stops: the stop strings; may be none.
        include_stop: end the emitted text with the stop string instead of right before it.

    Raises:
        RequestError: a stop string is empty (it would match everywhere).
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        if not all(stops):
            raise RequestError("a stop string must not be empty; leave `stop` out to stop at none", param="stop")
        self._stops = list(dict.fromkeys(stops))
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._include_stop = include_stop
        # Per stop string: how many of its characters the text ends with.
        self._matched = [0] * len(self._stops)
        # The text not yet emitted, and the best complete match in it as (start in that text, stop string).
        self._held = ""
        self._best: tuple[int, str] | None = None
        self._stopped: str | None = None

    def push(self, text: str, *, final: bool = False) -> tuple[str, str | None]:
        """Add text and return what is safe to emit, with the stop string once one has matched.

        After a match every further call returns `("", stop)`. With `final`, nothing is held back.
        """
        if self._stopped is not None:
            return "", self._stopped
        base = len(self._held)
        self._held += text
        for offset, char in enumerate(text, start=base + 1):
            self._advance(char, offset)
            if self._best is not None and self._best[0] <= self._earliest_open(offset):
                return self._stop(*self._best)
        if final and self._best is not None:
            return self._stop(*self._best)
        keep = len(self._held) if final else self._earliest_open(len(self._held))
        emitted, self._held = self._held[:keep], self._held[keep:]
        if self._best is not None:
            self._best = (self._best[0] - keep, self._best[1])
        return emitted, None

    def _advance(self, char: str, end: int) -> None:
        """Account for one character, which ends at `end` in the held text."""
        for index, stop in enumerate(self._stops):
            matched, failures = self._matched[index], self._failures[index]
            while matched and stop[matched] != char:
                matched = failures[matched]
            matched += stop[matched] == char
            if matched == len(stop):
                found = (end - matched, stop)
                if self._best is None or (found[0], len(stop)) < (self._best[0], len(self._best[1])):
                    self._best = found
                matched = failures[matched]
            self._matched[index] = matched

    def _earliest_open(self, end: int) -> int:
        """Where in the held text the earliest stop string begins that its end may still complete."""
        return end - max(self._matched, default=0)

    def _stop(self, start: int, stop: str) -> tuple[str, str]:
        emitted = self._held[:start] + (stop if self._include_stop else "")
        self._held, self._stopped = "", stop
        return emitted, stop


def _failure_table(pattern: str) -> list[int]:
    """For each prefix length of the pattern: the length of the longest proper prefix that is also its suffix."""
    table = [0] * (len(pattern) + 1)
    matched = 0
    for length in range(2, len(pattern) + 1):
        while matched and pattern[matched] != pattern[length - 1]:
            matched = table[matched]
        matched += pattern[matched] == pattern[length - 1]
        table[length] = matched
    return table
