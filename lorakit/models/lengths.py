"""How long records are in tokens, and which of them are too long: what `--dry-run` says first.

Every record is encoded as it is, however long, and, where that exceeds the limit, once more as the
run would have it: cut by --truncate, or refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.models.base import UNLIMITED
from lorakit.models.tokens import Encoder, Example
from lorakit.records.record import Record

Row = dict[str, object]  # one line of what a dry run says
_BINS = 10
_LONGEST_NAMED = 5


class Length(NamedTuple):
    """How long a record is in tokens, where it was read, and how many tokens it lost to a cut."""

    prompt: int
    completion: int
    where: str
    cut: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion


def length_of(example: Example) -> Length:
    """Return the length of an example."""
    return Length(example.start, example.targets, example.where, example.cut)


@dataclass
class Reading:
    """The lengths of the records that can be used, as they are and as the run will have them.

    `over` are those too long for `limit`, as they are; `examples` are what the run will have, where
    they are kept. `error` is the first that the run would end with.
    """

    limit: int
    whole: list[Length] = field(default_factory=list)
    fitted: list[Length] = field(default_factory=list)
    over: list[Length] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    error: LorakitError | None = None

    def check(self) -> None:
        """Raise the error that the run would end with, if there is one."""
        if self.error is not None:
            raise self.error


def read_lengths(
    records: Iterable[Record],
    encoder: Encoder,
    encode: Callable[[Encoder, Record], Example] = Encoder.example,
    *,
    room: int = 0,
    keep: bool = True,
) -> Reading:
    """Encode the records by `encode`, with `room` left for new tokens, and collect their lengths.

    A record that cannot be used is passed over; the error of the first one is in the result.
    Without `keep` no example is kept, so that a file may be larger than memory.
    """
    reading = Reading(encoder.limit)
    unlimited = replace(encoder, limit=UNLIMITED)
    for record in records:
        try:
            example = encode(unlimited, record)
            reading.whole.append(length_of(example))
            if len(example.ids) + room > encoder.limit:
                reading.over.append(length_of(example))
                example = encode(encoder, record)
        except LorakitError as error:
            reading.error = reading.error or error
            continue
        reading.fitted.append(length_of(example))
        if keep:
            reading.examples.append(example)
    return reading


def length_row(what: str, lengths: Sequence[int]) -> Row:
    """Return the line on the lengths of `what`, in tokens: the quantiles and a histogram."""
    ordered = sorted(lengths)
    if not ordered:
        return {"section": "lengths", "of": what, "records": 0, "bins": []}
    return {
        "section": "lengths",
        "of": what,
        "records": len(ordered),
        "least": ordered[0],
        "median": ordered[(len(ordered) - 1) // 2],
        "ninth_decile": ordered[math.ceil(0.9 * len(ordered)) - 1],
        "most": ordered[-1],
        "mean": round(sum(ordered) / len(ordered), 1),
        "bins": histogram(ordered),
    }


def histogram(lengths: Sequence[int]) -> list[dict[str, int]]:
    """Return how many lengths lie in each of at most ten bins of a round width, both ends in.

    Empty bins above the least length are there too.
    """
    width = _round_width(max(lengths) - min(lengths) + 1)
    first, last = min(lengths) // width, max(lengths) // width
    counts = [0] * (last - first + 1)
    for length in lengths:
        counts[length // width - first] += 1
    starts = range(first * width, (last + 1) * width, width)
    return [
        {"from": start, "to": start + width - 1, "records": count}
        for start, count in zip(starts, counts, strict=True)
    ]


def _round_width(spread: int) -> int:
    """Return the least of 1, 2, 5, 10, 20, 50 … whose bins, at any place, are at most ten."""
    widths = (step * int(10**power) for power in range(20) for step in (1, 2, 5))
    return next(width for width in widths if spread <= (_BINS - 1) * width)


def cut_row(reading: Reading) -> Row:
    """Return the line on what is too long: count, share, and the longest by file and line."""
    longest = sorted(reading.over, key=lambda length: -length.total)[:_LONGEST_NAMED]
    tokens = sum(length.total for length in reading.whole)
    lost = sum(length.cut for length in reading.fitted)
    return {
        "section": "cut",
        "limit": None if reading.limit >= UNLIMITED else reading.limit,
        "records": len(reading.whole),
        "too_long": len(reading.over),
        "share": round(len(reading.over) / max(1, len(reading.whole)), 4),
        "tokens_cut": round(lost / max(1, tokens), 4),
        "longest": [{"where": length.where, "tokens": length.total} for length in longest],
    }
