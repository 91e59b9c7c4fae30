"""Samples: a random draw of the records, and the documented row of each recipe as a file.

A recipe's function shows a real-shaped row, indented, at the end of its docstring; `⇥` is a tab.
`build-dataset RECIPE --show` reads it from there, so the documented row is one that works.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from lorakit.errors import LorakitError
from lorakit.recipes.request import RowFunction

T = TypeVar("T")


def draw(rows: Iterable[T], count: int, seed: int) -> list[T]:
    """Return `count` of the rows, in order: those with the smallest hash of seed and position.

    The draw is the same on every machine and holds only `count` rows in memory; a larger draw with
    the same seed contains the smaller one.
    """
    import heapq

    smallest = heapq.nsmallest(
        count, enumerate(rows), key=lambda item: _position_hash(item[0], seed)
    )
    return [row for _, row in sorted(smallest, key=lambda item: item[0])]


def _position_hash(position: int, seed: int) -> bytes:
    import hashlib

    return hashlib.sha256(f"{seed}:{position}".encode()).digest()


def sample_text(rows: RowFunction, name: str) -> str:
    """Return the indented text at the end of a recipe's docstring, as a file `name` holds it.

    A row of a `.jsonl` file becomes one line. Raises LorakitError if Python dropped the docstring.
    """
    import inspect
    import json

    lines = (inspect.getdoc(rows) or "").splitlines()
    start = len(lines)
    while start and (not lines[start - 1].strip() or lines[start - 1].startswith("    ")):
        start -= 1
    block = "\n".join(line[4:].replace("⇥", "\t") for line in lines[start:]).strip("\n")
    if not block:
        raise LorakitError("no sample row here; run Python without -OO, or name a SOURCE")
    if name.endswith(".jsonl"):
        return json.dumps(json.loads(block), ensure_ascii=False) + "\n"
    return f"{block}\n"


def write_sample(rows: RowFunction, name: str, folder: str) -> str:
    """Write a recipe's sample into a folder and return its path."""
    path = Path(folder) / name
    path.write_text(sample_text(rows, name), encoding="utf-8")
    return str(path)
