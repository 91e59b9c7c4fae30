"""Build records, write sources and run `build-dataset`, for the tests of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from lorakit.cli import lorakit
from lorakit.recipes.request import Request, Tally
from lorakit.recipes.table import build_dataset

Fields = dict[str, Any]


def built(recipe: str, *sources: object, **request: Any) -> list[Fields]:
    """Return the records of a build; `request` holds fields of Request."""
    return list(build_dataset(recipe, list(map(str, sources)), Request(**request)))


def tallied(recipe: str, *sources: object, **request: Any) -> tuple[list[Fields], Tally]:
    """Return the records and the tally of a build that skips malformed rows."""
    tally = Tally(skip=True)
    records = build_dataset(recipe, list(map(str, sources)), Request(**request), tally)
    return list(records), tally


def pairs(records: list[Fields]) -> list[tuple[str, str]]:
    return [(record["prompt"], record["completion"]) for record in records]


def save(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(lorakit, ["build-dataset", *map(str, arguments)], input=stdin)
