"""What the user asks of a recipe, and the tally of what became of its rows.

Every recipe takes its sources, a Request and a Tally. A malformed row goes to `Tally.reject`, one
that a filter removes to `Tally.remove`, so that nothing is dropped without being counted. This file
knows nothing of the command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lorakit.errors import LorakitError
from lorakit.records.record import Record

SPLITS = ("train", "validation", "test")
_REPORTED_ROWS = 10  # malformed rows that are reported one by one; the rest are only counted
_VALIDATION = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Request:
    """What the user asks of a recipe, besides its sources; None leaves it to the recipe."""

    split: str = "train"
    lang: str | None = None
    seed: int = 0
    sample: int | None = None
    template: str | None = None
    completion: str | None = None
    document: str | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_ratio: float | None = None
    highlights: str | None = None
    source: str | None = None
    target: str | None = None
    balance: bool | None = None
    overlap: tuple[str, ...] = ()
    drop_overlap: tuple[str, ...] = ()


def plain_split(split: str) -> str:
    """Return a split's name in SPLITS, where it has one: `validation` for `dev`."""
    return "validation" if split in _VALIDATION else split


def split_aliases(split: str) -> tuple[str, ...]:
    """Return the names under which files and data sets have a split; the name itself is first."""
    others = _VALIDATION if split in _VALIDATION else ()
    return (split, *(name for name in others if name != split))


def _ignore(_: object) -> None:
    pass


@dataclass
class Tally:
    """Counts of rows: malformed and skipped, removed by a filter, or kept but worth a notice.

    `skip` says whether malformed rows are skipped; `say` receives a line about each of the first
    ten, `advance` the number of bytes read from the sources.
    """

    skip: bool = False
    say: Callable[[str], object] = _ignore
    advance: Callable[[int], object] = _ignore
    skipped: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)

    def reject(self, error: LorakitError) -> None:
        """Count a malformed row, or raise its error unless malformed rows are skipped."""
        if not self.skip:
            raise error
        self.skipped += 1
        if self.skipped <= _REPORTED_ROWS:
            self.say(f"skipped {error}")

    def remove(self, reason: str) -> None:
        """Count a row that a filter removes."""
        self.removed[reason] += 1

    def lines(self) -> Iterator[str]:
        """Yield the report at the end, one line for each reason."""
        if self.skipped:
            yield f"skipped {self.skipped} malformed rows in all."
        for reason, count in self.removed.items():
            yield f"removed {count}: {reason}."
        for notice, count in self.noticed.items():
            yield f"{notice}: {count}."


class UnwantedError(Exception):
    """A row that the data set's filter removes; the text is the reason it is counted under."""


RowFunction = Callable[[Sequence[str], Request, Tally], Iterator[Record]]
