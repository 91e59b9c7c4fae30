"""The records of `find-boundary`: a line of JSON for each boundary, exactly one of them the best.

    {"boundary": 15, "score": 41.2, …, "best": true}

It knows nothing of how they were found; a boundary of k keeps the LoRA of the bottom k layers.
"""

from __future__ import annotations

from lorakit.errors import LorakitError
from lorakit.files import STDIO
from lorakit.records import Record, read_objects

_REMEDY = "give what `lorakit find-boundary` wrote"


def read_boundary(path: str) -> int:
    """Return the boundary of the best record of a JSONL file (`-`: stdin).

    Raises LorakitError naming file and line for a record that is none of find-boundary's and for a
    second best, and naming the file where none is the best.
    """
    best: Record | None = None
    name = "stdin" if path == STDIO else path
    for record in read_objects(path):
        _check(record)
        if record.fields["best"] and best is not None:
            raise LorakitError(f"{record.where}: a second best, after {best.where}; {_REMEDY}")
        best = record if record.fields["best"] else best
    if best is None:
        raise LorakitError(f"{name}: no record is the best; {_REMEDY}")
    return int(best.fields["boundary"])


def _check(record: Record) -> None:
    boundary, score = record.fields.get("boundary"), record.fields.get("score")
    if type(boundary) is not int or boundary < 0:
        raise LorakitError(f"{record.where}: 'boundary' is not a natural number; {_REMEDY}")
    if type(score) not in (int, float):
        raise LorakitError(f"{record.where}: 'score' is not a number; {_REMEDY}")
    if type(record.fields.get("best")) is not bool:
        raise LorakitError(f"{record.where}: 'best' is not true or false; {_REMEDY}")
