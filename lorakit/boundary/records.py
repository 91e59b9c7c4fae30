"""The records of `find-boundary`: a line of JSON for each boundary, exactly one of them the best.

    {"boundary": 15, "score": 41.2, …, "best": true}

Boundary k keeps the LoRA of the bottom k layers, or of the `layers` that a record names. The ways
of --by score boundaries and write these records; `strip-layers --boundary -` reads them.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

from lorakit.errors import LorakitError
from lorakit.files import STDIO
from lorakit.records.jsonl import read_objects
from lorakit.records.record import Record

_REMEDY = "give what `lorakit find-boundary` wrote"


class Curve(TypedDict):
    """Mean probabilities of the gold and of the likeliest token, by position in the completion."""

    probabilities: list[float]
    maximum_probabilities: list[float]


class ComparedCurve(Curve):
    """The curve of a stripped adapter, and how the gold token's differ from the whole adapter's."""

    differences: list[float]


class Comparison(TypedDict, total=False):
    """The curves of an adapter stripped at other boundaries, by boundary."""

    compared: dict[str, ComparedCurve]


class BoundaryRecord(TypedDict):
    """The fields of every record; `count` is the number of data records behind the score."""

    boundary: int
    score: float
    count: int
    best: bool


class CutFields(TypedDict, total=False):
    """What a search that is not the plain one adds to a record.

    `factor` is what the LoRA above the boundary is multiplied by; `layers` are those that keep
    theirs, by the rule `keep`, where they are not the bottom ones. `standard_error` is that of the
    paired difference from the highest score.
    """

    factor: float
    keep: str
    layers: list[int]
    standard_error: float


class EvaluationRecord(BoundaryRecord, CutFields):
    """A boundary scored by a metric; `baseline` is the score of the base model."""

    metric: str
    baseline: float
    signature: str


class ProbabilityRecord(BoundaryRecord, Curve, Comparison):
    """A boundary scored by the probabilities after that many layers."""


class BestCut(NamedTuple):
    """The best record's boundary, and its layers where they are not the bottom ones."""

    boundary: int
    layers: tuple[int, ...] | None = None


def read_cut(path: str) -> BestCut:
    """Return where the best record of a JSONL file (`-`: stdin) cuts an adapter.

    Raises LorakitError as `_read_best` does, and for a best record whose upper layers are scaled,
    not cut.
    """
    best = _read_best(path)
    fields = best.fields
    if factor := fields.get("factor"):
        raise LorakitError(
            f"{best.where}: the best scales the upper layers and strips none; "
            f"use lorakit scale-layers --from {fields['boundary']} --factor {factor}"
        )
    return BestCut(fields["boundary"], tuple(fields["layers"]) if "layers" in fields else None)


def read_soft_boundary(path: str) -> tuple[int, float | None]:
    """Return the boundary of the best record, and its `factor` if it has one.

    The factor is what the change of the layers above the boundary is multiplied by. Raises
    LorakitError as `_read_best` does, and for a best record whose layers are not the bottom ones.
    """
    best = _read_best(path)
    if best.fields.get("layers") is not None:
        raise LorakitError(
            f"{best.where}: the best keeps layers that are not the bottom ones; "
            "scale-layers needs records of find-boundary --keep bottom"
        )
    factor = best.fields.get("factor")
    return int(best.fields["boundary"]), None if factor is None else float(factor)


def _read_best(path: str) -> Record:
    """Return the best record of a JSONL file (`-`: stdin).

    Raises LorakitError naming file and line for a record that find-boundary did not write and for a
    second best one, and naming the file if no record is the best.
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
    return best


def _check(record: Record) -> None:
    """Raise LorakitError for a record with a field of the wrong type."""
    boundary, score = record.fields.get("boundary"), record.fields.get("score")
    if type(boundary) is not int or boundary < 0:
        raise LorakitError(f"{record.where}: 'boundary' is not a natural number; {_REMEDY}")
    if type(score) not in (int, float):
        raise LorakitError(f"{record.where}: 'score' is not a number; {_REMEDY}")
    layers = record.fields.get("layers", [])
    if type(layers) is not list or not all(type(n) is int and n >= 0 for n in layers):
        raise LorakitError(f"{record.where}: 'layers' are not natural numbers; {_REMEDY}")
    factor = record.fields.get("factor", 0.0)
    if type(factor) not in (int, float) or not 0 <= factor < math.inf:
        raise LorakitError(f"{record.where}: 'factor' is not a number from 0 on; {_REMEDY}")
    if type(record.fields.get("best")) is not bool:
        raise LorakitError(f"{record.where}: 'best' is not true or false; {_REMEDY}")
