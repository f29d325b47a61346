"""The conversations: every entry is taught, and what is added to them does not contradict the library."""

import pydoc
import random

import pytest

from tenfold.train.pico.conversations import (
    SMALL_TALK,
    conversations,
    invent_name,
    questions,
    unknown_answer,
)
from tenfold.train.pico.corpus import Entry, canonical_question, entries

JOIN = Entry("os.path.join", "function", "Join two or more pathname components.")


def exchanges(seed: int, **shares: float) -> list[tuple[str, str]]:
    found = []
    for messages in conversations(random.Random(seed), **shares):
        assert [message["role"] for message in messages] == ["user", "assistant"]
        found.append((messages[0]["content"], messages[1]["content"]))
    return found


@pytest.mark.parametrize("kind", ["function", "class", "method", "module"])
def test_questions_name_the_entry_and_differ(kind: str) -> None:
    asked = questions(Entry("a.b", kind, "An answer."))
    assert asked[0] == "What does a.b do?"
    assert len(asked) == len(set(asked))
    assert all("a.b" in question for question in asked)


def test_questions_as_users_ask_them() -> None:
    asked = questions(JOIN)
    assert {"What does os.path.join() do?", "Explain os.path.join.", "What is os.path.join?", "os.path.join"} <= set(
        asked
    )
    assert "What is the json module for?" in questions(Entry("json", "module", "JSON."))


def test_an_epoch_asks_for_every_entry() -> None:
    taught = set(exchanges(0))
    assert {(canonical_question(entry), entry.answer) for entry in entries()} <= taught
    assert set(SMALL_TALK) <= taught


def test_an_epoch_is_mostly_canonical_and_has_the_shares_asked_for() -> None:
    n = len(entries())
    assert len(exchanges(0, paraphrases=0.5, unknown=0.1)) == n + round(0.5 * n) + round(0.1 * n) + len(SMALL_TALK)
    canonical = {canonical_question(entry) for entry in entries()}
    asked = [question for question, _ in exchanges(0)]
    assert sum(question in canonical for question in asked) > 0.7 * len(asked)


def test_an_epoch_follows_from_its_generator_and_epochs_differ() -> None:
    assert exchanges(3) == exchanges(3)
    rng = random.Random(3)
    first, second = list(conversations(rng)), list(conversations(rng))
    assert first != second


def test_a_question_has_one_answer() -> None:
    """Over several epochs no question is ever answered in two ways, or the model could not learn it."""
    answers: dict[str, str] = {}
    for seed in range(5):
        for question, answer in exchanges(seed, paraphrases=1.0, unknown=0.2):
            assert answers.setdefault(question, answer) == answer, question


def test_other_entries_can_be_taught() -> None:
    taught = list(conversations(random.Random(0), [JOIN], paraphrases=1.0, unknown=2.0))
    assert len(taught) == 1 + 1 + 2 + len(SMALL_TALK)


def test_invented_names_are_not_in_the_library() -> None:
    rng = random.Random(0)
    names = {invent_name(rng) for _ in range(500)}
    assert len(names) > 400
    parts = {part for entry in entries(("function", "class", "method", "module")) for part in entry.name.split(".")}
    for name in names:
        assert not parts & set(name.split("."))
    assert pydoc.locate(next(iter(names))) is None
    assert unknown_answer("zwonk.blorp") == "I do not know zwonk.blorp. I only know Python's standard library."
