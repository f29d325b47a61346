"""`tenfold models`: which architectures are supported, and what each can do."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from tenfold.models.capabilities import Capabilities

_COLUMNS = ("architecture", "caches", "experts", "GGUF", "mesh axes")


def models(
    as_json: bool = typer.Option(False, "--json", help="An object for each architecture."),
    as_markdown: bool = typer.Option(False, "--markdown", help="The page docs/models.md."),
) -> None:
    """Show the supported architectures: their caches, experts, quantised formats, mesh axes and endpoints."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from tenfold.models.capabilities import CACHES, survey
    from tenfold.serve.app import GENERATING

    found = survey()
    if as_json:
        print(json.dumps([asdict(each) | {"endpoints": GENERATING} for each in found], indent=2))
        return
    if as_markdown:
        print(_page(found, CACHES, GENERATING), end="")
        return
    table = Table(*_COLUMNS, caption="  ".join(_of_all(found, GENERATING)))
    for each in found:
        table.add_row(*_row(each))
    Console().print(table)


def _page(found: "list[Capabilities]", caches: Mapping[str, str], endpoints: tuple[str, ...]) -> str:
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *map(_row, found)]
    return (
        "\n\n".join(
            (
                "# Supported architectures",
                "`tenfold models --markdown` wrote this page, from what the families make of small configurations.",
                "\n".join("| " + " | ".join(row) + " |" for row in rows),
                *_of_all(found, endpoints),
                "What layers hold of the tokens before, their caches:",
                "\n".join(f"- {name}: {meaning}" for name, meaning in caches.items()),
            )
        )
        + "\n"
    )


def _row(each: "Capabilities") -> tuple[str, ...]:
    experts, gguf = ("yes" if known else "" for known in (each.experts, "gguf" in each.formats))
    return each.architecture, ", ".join(each.caches), experts, gguf, ", ".join(each.axes)


def _of_all(found: "list[Capabilities]", endpoints: tuple[str, ...]) -> tuple[str, str]:
    """What the table leaves out, because it holds for every architecture."""
    formats = [name for name in found[0].formats if all(name in each.formats for each in found)]
    return f"All may be quantised: {', '.join(formats)}.", f"All answer at {' and '.join(endpoints)}."
