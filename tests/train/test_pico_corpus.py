"""The corpus: which names of the standard library it has, and that its answers are what their docstrings say."""

import inspect
import json
import keyword
import os
import pydoc
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.train.pico import corpus
from tenfold.train.pico.corpus import Entry, canonical_question, entries, held_out, sources, summarize

ALL_KINDS = ("function", "class", "method", "module")

SUMMARIES = {
    "first paragraph, joined": ("Join two\n    paths.\n\n    Then more.", "Join two paths."),
    "Argument Clinic leaves nothing to strip": ("Return the number of items.", "Return the number of items."),
    "signature": ("join(a, *p) -> str\n\nJoin paths.", "Join paths."),
    "signature without result": ("sin(x)\n\nReturn the sine of x.", "Return the sine of x."),
    "text right below the signature": ("sin(x)\nReturn the sine of x.", "Return the sine of x."),
    "long arrow": ("date(year, month, day) --> date object", "date object"),
    "dash": ("new(name, data=b'') - Return a new hash.", "Return a new hash."),
    "several signatures": (
        "str(object='') -> str\nstr(buffer[, encoding]) -> str\n\nCreate a string.",
        "Create a string.",
    ),
    "nested parentheses": ("f(a=(), b=g(1)) -> int\n\nCount the things.", "Count the things."),
    "signature over two lines": ("connect(host,\n        port) -> socket\n\nOpen a connection.", "Open a connection."),
    "nothing but signatures": (
        "dict() -> new empty dictionary\ndict(mapping) -> new dictionary from\n    a mapping",
        "new empty dictionary",
    ),
    "the result goes on": (
        "repeat(x) -> create an iterator\nfor ever and ever.",
        "create an iterator for ever and ever.",
    ),
    "result that hides the text": ("D.update(E) -> None.  Update D from E.", "Update D from E."),
    "arguments without a name": ("data [,options] -> marshalled data\n\nConvert the data.", "Convert the data."),
    "async": ("async anext(it[, default])\n\nReturn the next item.", "Return the next item."),
    "an arrow inside prose is prose": ("Return a map of scheme -> proxy.", "Return a map of scheme -> proxy."),
    "a call that begins a sentence is prose": ("Foo(x) is a class of x.", "Foo(x) is a class of x."),
    "unbalanced": ("broken(a, b is prose", "broken(a, b is prose"),
    "doctest first": (">>> f(1)\n1\n\nReturn one or two.", "Return one or two."),
    "doctest right after": ("Return one or two.\n>>> f(1)\n1", "Return one or two."),
    "remark in parentheses": ("lock() -> lock object\n(obsolete synonym here)\n\nCreate a lock.", "Create a lock."),
    "underlined title": ("The Title\n=========\n\nText below.", "The Title"),
    "leads up to a list": ("Sort it. The options are:\n\n- a", "Sort it."),
    "empty": ("", ""),
    "signature only": ("Point(x, y)", ""),
    "one word": ("Deprecated.", ""),
}


@pytest.fixture(scope="module")
def table() -> dict[str, Entry]:
    return {entry.name: entry for entry in entries(ALL_KINDS)}


@pytest.mark.parametrize(("doc", "expected"), SUMMARIES.values(), ids=SUMMARIES)
def test_summarize(doc: str, expected: str) -> None:
    assert summarize(doc) == expected


def test_summarize_cuts_at_the_last_sentence_within_the_limit() -> None:
    assert (
        summarize("One sentence, e.g. this. And two. And a third one.", limit=40) == "One sentence, e.g. this. And two."
    )


def test_summarize_cuts_at_a_word_where_no_sentence_ends() -> None:
    assert summarize("alpha beta, gamma delta", limit=15) == "alpha beta..."


@given(st.text(), st.integers(10, 300))
def test_summarize_is_one_bounded_line_for_any_text(doc: str, limit: int) -> None:
    summary = summarize(doc, limit)
    assert len(summary) <= limit
    assert summary == " ".join(summary.split())


@given(st.text(alphabet="ab(), ->[]:=.\n\t*", max_size=60))
def test_summarize_ends_on_signature_like_text(doc: str) -> None:
    assert "\n" not in summarize(doc)


def test_what_every_user_asks_about(table: dict[str, Entry]) -> None:
    assert table["os.path.join"].answer.startswith("Join two or more pathname components, inserting '/' as needed.")
    assert table["len"].answer == "Return the number of items in a container."
    assert table["math.sin"].answer == "Return the sine of x (measured in radians)."
    assert table["collections.OrderedDict"].answer == "Dictionary that remembers insertion order"
    assert table["shutil.rmtree"].answer == "Recursively delete a directory tree."
    for name in ("int", "str", "object", "type", "random.randint", "functools.partial", "asyncio.sleep", "re.match",
                 "json.dumps", "os.listdir", "itertools.chain", "subprocess.run", "threading.Lock"):  # fmt: skip
        assert name in table


def test_there_are_thousands() -> None:
    assert len(entries()) > 2000
    assert {entry.kind for entry in entries()} == {"function", "class"}
    assert {entry.kind for entry in entries(("module",))} == {"module"}


def test_sorted_and_each_name_once() -> None:
    names = [entry.name for entry in entries(ALL_KINDS)]
    assert names == sorted(set(names))


def test_answers_are_the_words_of_the_docstring() -> None:
    """`pydoc` finds each name in its own way; the answer must stand in the docstring that it finds there."""
    for entry in entries():
        found = pydoc.locate(re.sub(r"^os\.path\b", "posixpath", entry.name))
        if not inspect.ismodule(found):  # curses.has_key and unittest.main are a module and what it defines
            assert entry.answer.removesuffix("...") in " ".join((found.__doc__ or "").split()), entry.name


def test_answers_are_texts(table: dict[str, Entry]) -> None:
    for entry in table.values():
        assert len(entry.answer) <= corpus.ANSWER_LIMIT
        assert len(re.findall(r"[A-Za-z]+", entry.answer)) >= 2, entry
        assert entry.answer == " ".join(entry.answer.split())
        assert not re.match(r"[\w.]+\([^)]*\)( ->|$)", entry.answer), entry


@pytest.mark.parametrize(
    "module", [os, shutil, json, statistics, textwrap, os.path], ids=lambda module: module.__name__
)
def test_no_documented_function_of_a_module_is_missing(module: ModuleType, table: dict[str, Entry]) -> None:
    prefix = module.__name__.replace("posixpath", "os.path")
    known = {name for entry in table.values() for name in (entry.name, *entry.aliases)}
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isroutine(value) and len((value.__doc__ or "").split()) > 3:
            assert f"{prefix}.{name}" in known


def test_one_object_is_one_entry_under_the_name_that_users_write(table: dict[str, Entry]) -> None:
    assert "json.decoder.JSONDecoder" in table["json.JSONDecoder"].aliases
    assert "json.decoder.JSONDecoder" not in table
    assert "socket.error" in table["OSError"].aliases
    assert "asyncio.Queue" in table
    assert not [name for name in table if name.startswith(("posixpath.", "builtins.", "ntpath.", "posix."))]


def test_nothing_private_inherited_or_mechanical(table: dict[str, Entry]) -> None:
    assert "keyword.iskeyword" not in table  # a bound frozenset.__contains__
    assert keyword.iskeyword.__doc__ == frozenset.__contains__.__doc__
    assert "signal.Signals" not in table or table["signal.Signals"].answer != "An enumeration."
    assert not [name for name in table if name.startswith(("test.", "idlelib.")) or ".tests." in name]
    for entry in table.values():
        assert not entry.answer.startswith("Alias for field number")


def test_a_class_without_a_docstring_has_no_entry() -> None:
    class Base:
        """A base that is documented."""

    class Derived(Base):
        __doc__ = Base.__doc__

    assert corpus._entry("m.Derived", Derived, "class") is None
    assert corpus._entry("m.Base", Base, "class") == Entry("m.Base", "class", "A base that is documented.")


PRINT_DIGEST = f"""
import hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("corpus", {corpus.__file__!r})
sys.modules["corpus"] = corpus = importlib.util.module_from_spec(spec)
spec.loader.exec_module(corpus)
read = [corpus.entries({ALL_KINDS!r}), corpus.held_out(0), list(corpus.sources())]
print(hashlib.sha256(repr(read).encode()).hexdigest())
"""


def test_the_same_in_every_process() -> None:
    """Whatever the hash seed and the modules imported before; and the bare interpreter is enough."""

    def digest(*options: str, before: str = "") -> str:
        command = [sys.executable, *options, "-W", "error", "-c", before + PRINT_DIGEST]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert done.stderr == ""
        return done.stdout

    assert digest("-I", "-S") == digest(before="import tokenizers, numpy, unittest.mock, xml.dom.minidom\n")


def test_held_out_is_a_fixed_draw() -> None:
    drawn = held_out(7, 50)
    assert drawn == held_out(7, 50)
    assert drawn != held_out(8, 50)
    assert len(set(drawn)) == 50
    assert set(drawn) <= {(canonical_question(entry), entry.answer) for entry in entries()}
    assert len(held_out(0)) == 300


def test_sources_are_the_library_and_not_its_tests() -> None:
    found = list(sources())
    assert Path(shutil.__file__).read_text(encoding="utf-8") in found
    assert Path(os.path.__file__).read_text(encoding="utf-8") in found
    assert sum(map(len, found)) > 3_000_000
    assert found == list(sources())
    assert not any("class TestRmTree" in text for text in found)
