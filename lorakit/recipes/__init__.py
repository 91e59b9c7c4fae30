"""Recipes: from raw data to records.

A recipe yields the raw rows of one data set and names the templates that make a prompt and a
completion of a row. To add one: a function that yields rows, and a line in RECIPES. Nothing heavy
is imported here; a recipe that needs a parser imports it inside its function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.prompts import PROMPTS, Prompt, fields_of, fill
from lorakit.recipes.rows import csv_rows, json_rows
from lorakit.recipes.scitldr import scitldr_rows
from lorakit.records import Record

_KEPT = ("id", "references")


@dataclass(frozen=True)
class Request:
    """What the user asked of a recipe, beside its sources."""

    split: str = "train"
    lang: str = "en"
    seed: int = 0
    sample: int | None = None
    template: str | None = None
    completion: str | None = None


class Recipe(NamedTuple):
    """One data set: a line of help, its rows, and the templates of prompt and completion."""

    help: str
    rows: Callable[[Sequence[str], Request], Iterator[Record]]
    prompt: str = "{{prompt}}"
    completion: str = "{{completion}}"


def _microworld(sources: Sequence[str], request: Request) -> Iterator[Record]:
    from lorakit.recipes.microworld import TASKS, microworld

    if len(sources) != 1:
        raise LorakitError(f"microworld takes one task as SOURCE; choose from {', '.join(TASKS)}")
    made = microworld(sources[0], lang=request.lang, split=request.split, seed=request.seed)
    for number, fields in enumerate(made, 1):
        yield Record(fields, f"microworld {sources[0]}:{number}")


def _scitldr(sources: Sequence[str], request: Request) -> Iterator[Record]:
    if not sources:
        raise LorakitError("scitldr needs its folder or a file as SOURCE; name one")
    return scitldr_rows(sources, request.split)


RECIPES: dict[str, Recipe] = {
    "jsonl": Recipe("lines of JSON; --template names their fields", lambda s, _: json_rows(s)),
    "csv": Recipe("CSV or TSV with a header line; likewise", lambda s, _: csv_rows(s)),
    "scitldr": Recipe("SciTLDR: papers and TLDRs", _scitldr, PROMPTS["scitldr"], " {{tldr}}"),
    "microworld": Recipe("a generated world; SOURCE is one of its tasks", _microworld),
}


def build_dataset(
    recipe: str, sources: Sequence[str], request: Request | None = None
) -> Iterator[dict[str, object]]:
    """Yield the records of a recipe: `id`, `prompt`, `completion`, and the row's other fields.

    Fields that went into the prompt or the completion are not repeated. Raises LorakitError naming
    file and line for a row that is malformed or lacks a field of the templates.
    """
    request = request or Request()
    chosen = RECIPES[recipe]
    rows = chosen.rows(sources, request)
    if request.sample is not None:
        rows = iter(draw(rows, request.sample, request.seed))
    prompt = request.template or chosen.prompt
    completion = request.completion or chosen.completion
    for row in rows:
        yield _record(row, prompt, completion)


def _record(row: Record, prompt: str, completion: str) -> dict[str, object]:
    made = Prompt(fill(prompt, row.fields, row.where), fill(completion, row.fields, row.where))
    used = {"prompt", "completion", *fields_of(prompt), *fields_of(completion)} - {*_KEPT}
    rest = {name: value for name, value in row.fields.items() if name not in used and name != "id"}
    return {"id": row.id, "prompt": made.prefix, "completion": made.completion, **rest}


def draw(rows: Iterable[Record], count: int, seed: int) -> list[Record]:
    """Return `count` of the rows in their order: those whose hashed place under `seed` is least.

    The same draw on every machine, whatever else is installed, in memory of `count` rows; a larger
    draw under the same seed holds the smaller one.
    """
    import heapq

    numbered = enumerate(rows)
    least = heapq.nsmallest(count, numbered, key=lambda item: _lot(item[0], seed))
    return [row for _, row in sorted(least, key=lambda item: item[0])]


def _lot(place: int, seed: int) -> bytes:
    import hashlib

    return hashlib.sha256(f"{seed}:{place}".encode()).digest()
