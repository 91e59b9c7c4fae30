"""What is asked of a recipe, and the tally of what became of its rows.

Every recipe takes its sources, a Request and a Tally; it knows nothing of the command that made
them. A row that is malformed goes to `Tally.bad`, one that a filter removes to `Tally.remove`, so
that nothing is dropped without being counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.records import Record

SPLITS = ("train", "validation", "test")
TOLD = 10  # malformed rows that are named one by one; the rest is only counted


@dataclass(frozen=True)
class Request:
    """What the user asked of a recipe, beside its sources; None leaves it to the recipe."""

    split: str = "train"
    lang: str | None = None
    seed: int = 0
    sample: int | None = None
    template: str | None = None
    completion: str | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_ratio: float | None = None
    highlights: str | None = None
    source: str | None = None
    target: str | None = None
    overlap: tuple[str, ...] = ()
    drop_overlap: tuple[str, ...] = ()


def _nothing(_: object) -> None:
    pass


@dataclass
class Tally:
    """Counts of rows: skipped for being malformed, removed by a filter, noticed and kept.

    `skip` says whether malformed rows are passed over; `say` is told of each of the first ones;
    `advance` is told how many bytes of the sources were read.
    """

    skip: bool = False
    say: Callable[[str], object] = _nothing
    advance: Callable[[int], object] = _nothing
    skipped: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)

    def bad(self, error: LorakitError) -> None:
        """Count a malformed row, or raise its error where rows are not to be skipped."""
        if not self.skip:
            raise error
        self.skipped += 1
        if self.skipped <= TOLD:
            self.say(f"skipped {error}")

    def remove(self, reason: str) -> None:
        """Count a row that a filter removes."""
        self.removed[reason] += 1

    def lines(self) -> Iterator[str]:
        """Yield what is to be said at the end, a line for each reason."""
        if self.skipped:
            yield f"skipped {self.skipped} malformed rows in all."
        for reason, count in self.removed.items():
            yield f"removed {count}: {reason}."
        for what, count in self.noticed.items():
            yield f"{what}: {count}."


class UnwantedError(Exception):
    """A row that the data set's filter removes; the text is the reason under which it counts."""


Rows = Callable[[Sequence[str], Request, Tally], Iterator[Record]]


class Recipe(NamedTuple):
    """One data set: a line of help, its rows, and the templates of prompt and completion.

    `rows` names the function that yields them by its module in this folder: `news.news_rows`.
    `sample` is the name of a file that holds the documented row of the function `rows`, and
    `options` names the fields of Request that only some recipes read. A row that stands in no text
    file is shown by another recipe, `shown_by`.
    """

    help: str
    rows: str
    prompt: str = "{{prompt}}"
    completion: str = "{{completion}}"
    sample: str = "sample.jsonl"
    options: tuple[str, ...] = ()
    shown_by: str = ""

    @property
    def function(self) -> Rows:
        """The function that yields the rows; its module is imported now."""
        import importlib

        module, _, name = self.rows.rpartition(".")
        found: Rows = getattr(importlib.import_module(f"lorakit.recipes.{module}"), name)
        return found
