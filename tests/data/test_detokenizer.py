"""Incremental text against the decoding of the whole by the `tokenizers` library, and stop strings against `find`."""

import codecs
import functools
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tenfold.base.errors import RequestError
from tenfold.data.decoder import MAX_OPEN_RUN, DecoderKind
from tenfold.data.detokenizer import Detokenizer, StopStrings
from tests.data.vocabularies import BUILDERS, vocabulary

TEXT = st.text(
    st.one_of(st.sampled_from("the quick ▁\n'.,🎉日本é👩‍👧"), st.characters(exclude_categories=["Cs"])), max_size=40
)


@functools.cache
def _some_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Ids that have a token, with those that take part in unfinished characters as often as all others."""
    oracle, ours = vocabulary(kind)
    ids = [index for index in range(ours.vocab_size) if oracle.id_to_token(index) is not None]
    partial = [index for index in ids if len(ours.token_bytes(index)) == 1 and ours.token_bytes(index) > b"\x7f"]
    common = st.sampled_from(ids)
    return st.lists(st.one_of(common, st.sampled_from(partial)) if partial else common, max_size=12)


def _cut(ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in pairwise(bounds)]


def _expected(kind: str, prompt: list[int], generated: list[int], *, skip: bool) -> str:
    """The definition: the decoding of both without the longest prefix that it shares with that of the prompt."""
    oracle, _ = vocabulary(kind)
    before = oracle.decode(prompt, skip_special_tokens=skip)
    both = oracle.decode(prompt + generated, skip_special_tokens=skip)
    shared = max(length for length in range(len(before) + 1) if both.startswith(before[:length]))
    return both[shared:]


class TestDetokenizer:
    @pytest.mark.parametrize("kind", BUILDERS)
    @given(data=st.data())
    def test_random_ids(self, kind: str, data: st.DataObject):
        prompt, generated = data.draw(_some_ids(kind), "prompt"), data.draw(_some_ids(kind), "generated")
        cuts = data.draw(st.lists(st.integers(0, 12)), "cuts")
        skip = data.draw(st.booleans(), "skip")
        detokenizer = Detokenizer(vocabulary(kind)[1], skip_special_tokens=skip, prompt_token_ids=prompt)
        pieces = [detokenizer.push(part) for part in _cut(generated, cuts)]
        assert "".join([*pieces, detokenizer.finish()]) == _expected(kind, prompt, generated, skip=skip)
        assert detokenizer.finish() == ""

    @pytest.mark.parametrize("kind", ["byte_level", "llama_2", "gemma", "unigram", "word_piece"])
    @given(text=TEXT, split=st.integers(0, 30))
    def test_random_text(self, kind: str, text: str, split: int):
        oracle, ours = vocabulary(kind)
        ids = oracle.encode(text).ids
        prompt, generated = ids[:split], ids[split:]
        detokenizer = Detokenizer(ours, prompt_token_ids=prompt)
        pieces = [detokenizer.push([token_id]) for token_id in generated]
        assert "".join([*pieces, detokenizer.finish()]) == _expected(kind, prompt, generated, skip=True)

    @pytest.mark.parametrize("kind", BUILDERS)
    @settings(max_examples=30)
    @given(data=st.data())
    def test_without_a_prompt_it_is_decode(self, kind: str, data: st.DataObject):
        oracle, ours = vocabulary(kind)
        generated = data.draw(_some_ids(kind))
        detokenizer = Detokenizer(ours)
        text = detokenizer.push(generated) + detokenizer.finish()
        assert text == ours.decode(generated) == oracle.decode(generated)

    @given(st.text(max_size=30))
    def test_bytes_show_every_finished_character_at_once(self, text: str):
        oracle, ours = vocabulary("byte_level")
        detokenizer, utf8 = Detokenizer(ours), codecs.getincrementaldecoder("utf-8")()
        for token_id in oracle.encode(text, add_special_tokens=False).ids:
            assert detokenizer.push([token_id]) == utf8.decode(ours.token_bytes(token_id))
        assert detokenizer.finish() == ""

    @given(st.text(st.sampled_from("the quick 日ж🎊"), max_size=30))
    def test_pieces_hold_back_nothing_but_the_open_byte_run(self, text: str):
        oracle, ours = vocabulary("llama_2")
        ids = oracle.encode(text).ids
        detokenizer, shown = Detokenizer(ours), ""
        for count, token_id in enumerate(ids, start=1):
            shown += detokenizer.push([token_id])
            run = 0
            while run < count and ours.decoder.byte(ours.piece(ids[count - 1 - run]) or "") is not None:
                run += 1
            if run < MAX_OPEN_RUN:
                assert shown == oracle.decode(ids[: count - run])

    @pytest.mark.parametrize("kind", ["llama_2", "gemma"])
    def test_text_of_nothing_but_bytes_flows(self, kind: str):
        oracle, ours = vocabulary(kind)
        ids = [oracle.token_to_id(f"<0x{byte:02X}>") for byte in ("ሰላም" * 200).encode()]
        detokenizer = Detokenizer(ours)
        silent, longest, shown = 0, 0, ""
        for token_id in ids:
            piece = detokenizer.push([token_id])
            shown += piece
            silent = 0 if piece else silent + 1
            longest = max(longest, silent)
        assert shown + detokenizer.finish() == ours.decode(ids) == "ሰላም" * 200
        assert longest <= MAX_OPEN_RUN + 2

    @pytest.mark.parametrize(("kind", "byte"), [("byte_level", "\u0122"), ("llama_2", "<0x80>")])
    def test_endless_invalid_bytes_are_not_held_back(self, kind: str, byte: str):
        oracle, ours = vocabulary(kind)
        detokenizer = Detokenizer(ours)
        assert ours.token_bytes(oracle.token_to_id(byte)) == b"\x80"
        assert [detokenizer.push([oracle.token_to_id(byte)]) for _ in range(1000)] == ["\ufffd"] * 1000

    def test_the_first_word_keeps_its_space_after_a_prompt(self):
        _, ours = vocabulary("llama_2")
        ids = ours.encode("the fox", add_special_tokens=False)
        assert Detokenizer(ours).push(ids) == "the fox"
        assert Detokenizer(ours, prompt_token_ids=[1]).push(ids) == "the fox"
        assert Detokenizer(ours, prompt_token_ids=[1, *ids]).push(ids) == " the fox"
        assert Detokenizer(ours, prompt_token_ids=[1], skip_special_tokens=False).push(ids) == " the fox"

    @pytest.mark.parametrize("kind", ["byte_level", "llama_2"])
    def test_a_character_that_the_prompt_began_belongs_to_the_generation(self, kind: str):
        oracle, ours = vocabulary(kind)
        ids = ours.encode("the ж", add_special_tokens=False)
        detokenizer = Detokenizer(ours, prompt_token_ids=ids[:-1])
        assert oracle.decode(ids[:-1]) == "the \ufffd"
        assert detokenizer.push(ids[-1:]) + detokenizer.finish() == "ж"
        # If it is never finished, the prompt's own text has the replacement character already.
        assert Detokenizer(ours, prompt_token_ids=ids[:-1]).finish() == ""

    def test_special_tokens_in_the_middle(self):
        _, ours = vocabulary("byte_level")
        ids = ours.encode("a<|end|>b<tool>", add_special_tokens=False)
        assert Detokenizer(ours).push(ids) == "ab<tool>"
        assert Detokenizer(ours, skip_special_tokens=False).push(ids) == "a<|end|>b<tool>"
        # A special token that is skipped does not separate the bytes around it; one that is shown does.
        first, second = ours.encode("ж", add_special_tokens=False)
        apart = [first, *ours.encode("<|end|>", add_special_tokens=False), second]
        assert Detokenizer(ours).push(apart) == "ж"
        assert Detokenizer(ours, skip_special_tokens=False).push(apart) == "\ufffd<|end|>\ufffd"

    @pytest.mark.parametrize("kind", BUILDERS)
    def test_ids_without_a_token_add_nothing(self, kind: str):
        _, ours = vocabulary(kind)
        ids = [0, 1, 2, 3]
        padded = [ours.vocab_size, *ids[:2], ours.vocab_size + 7, *ids[2:], 1 << 40]
        detokenizer = Detokenizer(ours, skip_special_tokens=False)
        assert detokenizer.push(padded) + detokenizer.finish() == ours.decode(ids, skip_special_tokens=False)

    @pytest.mark.parametrize("kind", ["byte_level", "llama_2", "gemma", "unigram"])
    def test_a_long_prompt_is_read_at_its_ends_only(self, kind: str):
        class Prompt(list[int]):
            reads = 0

            def __getitem__(self, index):
                Prompt.reads += 1
                return super().__getitem__(index)

            def __reversed__(self):
                for index in range(len(self) - 1, -1, -1):
                    yield self[index]

        _, ours = vocabulary(kind)
        Prompt.reads = 0
        Detokenizer(ours, prompt_token_ids=Prompt(ours.encode("the quick brown fox ж " * 5000)))
        assert Prompt.reads < 20

    def test_what_is_not_understood_comes_at_the_end(self):
        oracle, ours = vocabulary("suffix_bpe")
        ids = [0, 1, 0, 2]
        assert ours.decoder.kind is DecoderKind.WHOLE
        detokenizer = Detokenizer(ours)
        assert [detokenizer.push([token_id]) for token_id in ids] == [""] * 4
        assert detokenizer.finish() == oracle.decode(ids) == "low loer"


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    return (min(found)[0], min(found)[2]) if found else None


class TestStopStrings:
    @given(
        pieces=st.lists(st.text(st.sampled_from("abc"), max_size=6), max_size=8),
        stops=st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=5), max_size=4),
        include_stop=st.booleans(),
    )
    @example(pieces=["ab", "cx"], stops=["abcd", "bc"], include_stop=False)
    @example(pieces=["abc", "d"], stops=["abcd", "bc"], include_stop=False)
    @example(pieces=["aab", "aaab"], stops=["aaab"], include_stop=True)
    def test_outcome_is_that_of_find_on_the_whole(self, pieces: list[str], stops: list[str], include_stop: bool):
        matcher = StopStrings(stops, include_stop=include_stop)
        emitted, stopped = "", None
        for index, piece in enumerate(pieces):
            text, stopped = matcher.push(piece, final=index == len(pieces) - 1)
            emitted += text
        whole = "".join(pieces)
        found = _first_stop(whole, stops)
        if found is None:
            assert (emitted, stopped) == (whole, None)
        else:
            start, stop = found
            assert (emitted, stopped) == (whole[:start] + (stop if include_stop else ""), stop)
            assert matcher.push("more") == ("", stop)

    @given(
        pieces=st.lists(st.text(st.sampled_from("ab"), max_size=5), max_size=8),
        stops=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=6), min_size=1, max_size=3),
    )
    def test_holds_back_exactly_what_may_become_a_stop(self, pieces: list[str], stops: list[str]):
        matcher, emitted, whole = StopStrings(stops), "", ""
        for piece in pieces:
            text, stopped = matcher.push(piece)
            emitted, whole = emitted + text, whole + piece
            if _first_stop(whole, stops) is not None:
                return
            assert stopped is None
            longest = max(stop_prefix for stop_prefix in range(len(whole) + 1) if _may_stop(whole, stop_prefix, stops))
            assert len(whole) - len(emitted) == longest < max(map(len, stops))

    def test_without_stop_strings_everything_passes(self):
        assert StopStrings(()).push("abc") == ("abc", None)

    def test_a_match_waits_for_an_earlier_one(self):
        matcher = StopStrings(["bc", "abcd"])
        assert matcher.push("xabc") == ("x", None)
        assert matcher.push("", final=True) == ("a", "bc")

    def test_work_is_linear(self):
        matcher = StopStrings(["a" * 5000 + "b"])
        for _ in range(20_000):
            matcher.push("a")
        assert matcher.push("b") == ("", "a" * 5000 + "b")

    def test_an_empty_stop_string_is_refused(self):
        with pytest.raises(RequestError, match="must not be empty") as caught:
            StopStrings(["a", ""])
        assert caught.value.param == "stop"


def _may_stop(text: str, length: int, stops: Sequence[str]) -> bool:
    """Whether the last characters of a text are the beginning of a stop string."""
    return any(stop.startswith(text[len(text) - length :]) for stop in stops)
