"""Samples: a random draw of the records, and the documented row of each recipe as a file.

A recipe's function shows a real-shaped row, indented, at the end of its docstring; `⇥` is a tab.
`build-dataset RECIPE --show` reads it from there, so the documented row is one that works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from lorakit.errors import LorakitError
from lorakit.recipes.request import Request, RowFunction, Tally
from lorakit.records.record import Record

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


def drawn(records: Iterable[Record], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield the records of `--sample`, of `--balance`, or of both, in their order."""
    if request.balance:
        records = draw_balanced(records, request.sample, request.seed, tally)
    elif request.sample is not None:
        records = draw(records, request.sample, request.seed)
    yield from records


def draw_balanced(
    records: Iterable[Record], count: int | None, seed: int, tally: Tally
) -> list[Record]:
    """Return, in their order, equally many records of every completion that there is.

    Together they are at most `count`. The tally says how many there were of each. Raises
    LorakitError if all records have one completion.
    """
    groups: dict[str, list[tuple[int, Record]]] = {}
    for numbered in enumerate(records):
        groups.setdefault(numbered[1].completion, []).append(numbered)
    if len(groups) < 2:
        names = " and ".join(repr(name.strip()) for name in groups) or "none"
        raise LorakitError(f"--balance needs two answers but there is {names}; leave it out")
    share = min(map(len, groups.values()))
    share = share if count is None else min(share, count // len(groups))
    found = " and ".join(f"{len(group)} {name.strip()}" for name, group in groups.items())
    tally.say(f"balanced: {share} of each answer, of {found}.")
    balanced = [item for group in groups.values() for item in draw(group, share, seed)]
    return [record for _, record in sorted(balanced, key=lambda item: item[0])]


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
