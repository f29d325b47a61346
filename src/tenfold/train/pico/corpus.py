"""What pico learns: Python's standard library, as the running interpreter carries it.

The corpus has two halves. `entries` is a table from every documented public function and class to the summary of its
docstring; `sources` is the library's own source code. Both are read from the interpreter, so that nothing has to be
downloaded and two runs of one interpreter agree to the byte.
"""

import functools
import importlib
import importlib.util
import inspect
import io
import os
import pkgutil
import random
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

Kind = Literal["function", "class", "method", "module"]

ANSWER_LIMIT = 240
"""Characters above which an answer is cut at the end of a sentence."""

SKIPPED = frozenset({
    # Importing these prints, opens a window or a browser, or they are programs and tests rather than a library.
    "antigravity", "idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo", "xxlimited", "xxlimited_35",
    "xxsubtype",
    # The same functions under the names of their implementation; users write `os.path.join`, `os.open`, `re.error`.
    "genericpath", "nt", "ntpath", "posix", "posixpath", "sre_compile", "sre_constants", "sre_parse",
    # Removed in 3.12, and setuptools puts its own copy in their place.
    "distutils",
    # One undocumented module per codec.
    "encodings",
})  # fmt: skip

_SKIPPED_PARTS = frozenset({"test", "tests", "idle_test", "__main__"})

_BOILERPLATE = re.compile(r"Alias for field number|An enumeration\.$|<==>")
_SIGNATURE_HEAD = re.compile(r"\s*(?:class |async )?[A-Za-z_][\w.]* ?\(")
_ARGUMENTS = re.compile(r"\s*[a-z\[][\w, \[\]]*(?=[ \t]->)")
_RETURNS = re.compile(
    r"[ \t]*(?P<arrow>(?:-{1,2}>|=>|--?(?=\s)|:)[ \t]*)?"
    r"(?P<text>[^\n]*(?:\n[ \t]+\S[^\n]*|\n(?=[a-z])(?!\w[\w.]* ?\()[^\n]*)*)"
)
_SENTENCE_END = re.compile(r"(?<![A-Z.])(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?][\"')\]`]*(?=\s+[A-Z`'\"(\[*]|\s*$)")


@dataclass(frozen=True)
class Entry:
    """One name of the standard library and what pico answers about it.

    Attributes:
        name: dotted name as users write it: `len`, `os.path.join`, `asyncio.Queue`.
        kind: what the name is bound to.
        answer: the summary of its docstring, on one line; see `summarize`.
        aliases: the other public names of the same object, sorted.
    """

    name: str
    kind: Kind
    answer: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Binding:
    """A public name, the object that it is bound to, and how good a name for that object it is (less is better)."""

    name: str
    value: object
    rank: tuple[bool, int, bool, bool, str]


def entries(kinds: Sequence[Kind] = ("function", "class")) -> list[Entry]:
    """Every documented public name of the wanted kinds, sorted by name.

    A name is public when its module lists it in `__all__`, or, without `__all__`, when it has no leading underscore and
    was defined there (or in a private module). One object bound to several names is one entry under its best name: one
    that is declared rather than merely visible, has the fewest dots, and is what the object calls itself.
    """
    found = {entry.name: entry for entry in _all_entries() if entry.kind in kinds}
    return [found[name] for name in sorted(found)]


def held_out(seed: int, n: int = 300) -> list[tuple[str, str]]:
    """A random draw of `n` (question, answer) pairs, the same for the same `seed` and interpreter.

    The names are drawn from those that pico is trained on: the measure is recall, not generalisation.
    """
    drawn = random.Random(seed).sample(entries(), n)
    return [(canonical_question(entry), entry.answer) for entry in drawn]


def canonical_question(entry: Entry) -> str:
    """The phrasing that pico is trained on most and measured with."""
    return f"What does {entry.name} do?"


def sources() -> Iterator[str]:
    """The text of each public module that is written in Python, in the order of their names."""
    for module in _modules():
        path = Path(module.__file__ or "") if hasattr(module, "__file__") else Path()
        if path.suffix == ".py" and path.is_file():
            yield importlib.util.decode_source(path.read_bytes())


def summarize(doc: str, limit: int = ANSWER_LIMIT) -> str:
    """The summary of a docstring: its first paragraph of prose on one line, or "" where it has none.

    Leading signatures, which C docstrings often have ("join(a, *p) -> str"), are skipped; where a docstring is nothing
    but signatures, the summary is what the first of them says that it returns. White space is normalised. A summary
    longer than `limit` characters ends at its last sentence within the limit, or else at a word, with "...".
    """
    rest, returned = _strip_signatures(inspect.cleandoc(doc))
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=\s*>>>)|\n(?=[-=]{3,})", rest))
    prose = next((text for text in paragraphs if _is_prose(text)), "")
    return _shorten(prose or returned, limit)


def _is_prose(text: str) -> bool:
    return len(re.findall(r"[A-Za-z]{2,}", text)) >= 2 and not re.match(r">>>|---|===|\(.*\)$", text)


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit and not text.endswith(":"):
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() <= limit]
    if ends:
        return text[: ends[-1]]
    return text if len(text) <= limit else text[: limit - 3].rsplit(" ", 1)[0].rstrip(",;:") + "..."


def _strip_signatures(doc: str) -> tuple[str, str]:
    """What follows the signatures that `doc` starts with, and what the first informative one says that it returns."""
    returned = ""
    while True:
        head = _SIGNATURE_HEAD.match(doc)
        arguments = None if head else _ARGUMENTS.match(doc)
        end = _closing(doc, head.end() - 1) if head else arguments.end() if arguments else -1
        after = _RETURNS.match(doc, end) if end >= 0 else None
        if after is None or (after["text"].split("\n")[0] and not after["arrow"]):
            return doc, returned
        if after["arrow"]:
            text = re.sub(r"^\w+\.\s+(?=[A-Z])", "", " ".join(after["text"].split()))
            if not returned and len(text.split()) >= 2:
                returned = text
            end = after.end()
        doc = doc[end:]


def _closing(text: str, opening: int) -> int:
    """The index just past the parenthesis that closes the one at `opening`, or -1."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return -1


@functools.cache
def _all_entries() -> tuple[Entry, ...]:
    modules = _modules()
    bindings: dict[int, list[_Binding]] = {}
    for module in modules:
        for binding in _bindings(module):
            bindings.setdefault(id(binding.value), []).append(binding)
    found = [_entry(module.__name__ if module.__name__ != "posixpath" else "os.path", module, "module")
             for module in modules]  # fmt: skip
    for same in bindings.values():
        best = min(same, key=lambda binding: binding.rank)
        kind: Kind = "class" if inspect.isclass(best.value) else "function"
        aliases = tuple(sorted({binding.name for binding in same} - {best.name}))
        found.append(_entry(best.name, best.value, kind, aliases))
        if isinstance(best.value, type):
            found.extend(_methods(best.name, best.value))
    return tuple(entry for entry in found if entry is not None)


def _entry(name: str, value: object, kind: Kind, aliases: tuple[str, ...] = ()) -> Entry | None:
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or (isinstance(value, type) and _inherits(value, doc)):
        return None
    answer = summarize(doc)
    if not answer or _BOILERPLATE.search(answer):
        return None
    return Entry(name, kind, answer, aliases)


def _inherits(value: type, doc: str) -> bool:
    """Whether the class was documented by one of its bases, or by its metaclass, rather than for itself."""
    others = (*inspect.getmro(value), *inspect.getmro(type(value)))
    return any(doc == other.__doc__ for other in others if other is not value)


def _methods(owner: str, cls: type) -> Iterator[Entry]:
    for name, value in sorted(vars(cls).items()):
        method = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if not name.startswith("_") and inspect.isroutine(method):
            entry = _entry(f"{owner}.{name}", method, "method")
            if entry is not None:
                yield entry


def _bindings(module: ModuleType) -> Iterator[_Binding]:
    prefix = {"builtins": "", "posixpath": "os.path."}.get(module.__name__, f"{module.__name__}.")
    declared = getattr(module, "__all__", None)
    names: Iterable[str] = declared if declared is not None else vars(module)
    for name in sorted({name for name in names if declared is not None or not name.startswith("_")}):
        value = getattr(module, name, None)
        if not (inspect.isroutine(value) or inspect.isclass(value) or hasattr(type(value), "cache_info")):
            continue
        home = str(getattr(value, "__module__", None) or "")
        if declared is None and home != module.__name__ and not home.startswith("_"):
            continue
        full = prefix + name
        owned = declared is not None or home == module.__name__
        called = getattr(value, "__name__", "")
        yield _Binding(full, value, (not owned, full.count("."), name != called, home != module.__name__, full))


@functools.cache
def _modules() -> tuple[ModuleType, ...]:
    """Every public module that imports here, by name; one that does not (another platform's) is left out."""
    found: dict[str, ModuleType] = {}
    pending = [name for name in sorted(sys.stdlib_module_names) if name not in SKIPPED and not name.startswith("_")]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        while pending:
            name = pending.pop()
            try:
                module = importlib.import_module(name)
            except (Exception, SystemExit):  # noqa: BLE001  (what a module raises on a foreign platform is its own choice)
                continue
            found[name] = module
            for child in pkgutil.iter_modules(getattr(module, "__path__", ())):
                if not child.name.startswith("_") and child.name not in _SKIPPED_PARTS:
                    pending.append(f"{name}.{child.name}")
    found["os.path"] = os.path
    return tuple(found[name] for name in sorted(found))
