"""The text of one completion while its tokens arrive: detokenisation, stop strings and offsets in one place.

The engine speaks token ids and knows nothing of stop strings. Whoever turns its outputs into text (the offline API, the
server) keeps one `CompletionText` per completion, and aborts the completion in the engine when a stop string appears.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tenfold.data.detokenizer import Detokenizer, StopStrings
from tenfold.data.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """What some tokens added to a completion.

    Attributes:
        text: final text, never taken back; often "".
        stop: the stop string that ended the completion, once one has.
        num_tokens: how many of the pushed tokens belong to the completion: all, or those up to and including the one
            that completed the stop string.
        offsets: for each of these, where its text begins, in characters from the completion's first. A token that
            continues a character begins where that character does.
    """

    text: str
    stop: str | None
    num_tokens: int
    offsets: tuple[int, ...]


class CompletionText:
    """Turns the token ids of one completion into text as they arrive.

    How the ids are cut into calls of `push` makes no difference to the joined text, the stop string, the number of
    tokens kept or their offsets.

    Args:
        tokenizer: the model's.
        prompt_token_ids: what the completion continues; decides, for one, whether its first word keeps its space.
        skip_special_tokens: leave special tokens out of the text.
        stop: strings that end the completion where they first appear.
        include_stop: keep what ended the completion, a stop string or a stop token, in the text.
        min_tokens: stop strings count only in text that comes after this many tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, prompt_token_ids=prompt_token_ids
        )
        self._stops = StopStrings(stop, include_stop=include_stop) if stop else None
        self._include_stop = include_stop
        self._unwatched = min_tokens if stop else 0
        self._length = 0
        self._stop: str | None = None

    def push(self, token_ids: Sequence[int], *, final: bool, stop_token: bool = False) -> TextDelta:
        """Add the completion's next tokens and return what they make final.

        After a stop string has matched, further calls add nothing and keep no tokens.

        Args:
            token_ids: in order; may be none.
            final: they are the last, so nothing is held back any more.
            stop_token: the last of them ended the completion (an end token, or one of `stop_token_ids`), so its
                text does not belong to the completion unless `include_stop`.
        """
        if self._stop is not None:
            return TextDelta("", self._stop, 0, ())
        text = ""
        offsets: list[int] = []
        silent = len(token_ids) - 1 if stop_token and not self._include_stop else -1
        for index, token_id in enumerate(token_ids):
            offsets.append(self._length)
            if index != silent:
                text += self._watch(self._detokenizer.push((token_id,)))
            self._unwatched = max(0, self._unwatched - 1)
            if self._stop is not None:
                return TextDelta(text, self._stop, index + 1, tuple(offsets))
        if final:
            text += self._watch(self._detokenizer.finish(), final=True)
        return TextDelta(text, self._stop, len(token_ids), tuple(offsets))

    def _watch(self, text: str, *, final: bool = False) -> str:
        """The part of new text that no stop string can claim; notes the stop string that matched."""
        self._length += len(text)
        if self._stops is None or self._unwatched:
            return text
        emitted, self._stop = self._stops.push(text, final=final)
        return emitted
