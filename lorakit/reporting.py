"""What the library reports while it works: notes, progress, and the lines of a log.

The library prints nothing. Every long-running function takes a Reporter; the commands pass one that
writes to stderr and to `--log` (commands/_progress.py), everyone else may leave it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class StepReport:
    """One optimiser step; `train_loss` in nats a token, `grad_norm` before clipping.

    `candidate` names the run where a search trains several.
    """

    step: int
    epoch: int
    train_loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    candidate: str | None = None

    def log_entry(self) -> dict[str, object]:
        """Return the line of the log: the candidate first, where there is one."""
        return _log_entry(asdict(self), self.candidate)


@dataclass(frozen=True)
class EpochReport:
    """One epoch and its validation; losses in nats a token.

    `validation_score` is the metric of `--select-by`, None where that is the loss.
    """

    epoch: int
    step: int
    train_loss: float
    validation_loss: float
    best: bool
    seconds: float
    validation_score: float | None = None
    candidate: str | None = None

    def log_entry(self) -> dict[str, object]:
        """Return the line of the log: the candidate first, `seconds` last."""
        fields = asdict(self)
        seconds, score = fields.pop("seconds"), fields.pop("validation_score")
        if score is not None:
            fields["validation_score"] = score
        return _log_entry({**fields, "seconds": seconds}, self.candidate)


def _log_entry(fields: dict[str, object], candidate: str | None) -> dict[str, object]:
    del fields["candidate"]
    return fields if candidate is None else {"candidate": candidate, **fields}


class Reporter(Protocol):
    """Receives what a long run has to say."""

    def note(self, text: str) -> None:
        """Take one line for the user; `Warning: …` is a warning."""

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items and show how many have passed."""
        ...

    def timed(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """Yield the items and show how many have passed and the time that is left."""
        ...

    def start(self, steps: int, epochs: int, done: int) -> None:
        """Learn that a run of so many optimiser steps begins, `done` of them behind it."""

    def step(self, report: StepReport) -> None:
        """Learn of an optimiser step."""

    def epoch(self, report: EpochReport) -> None:
        """Learn of the end of an epoch."""

    def event(self, entry: Mapping[str, object], text: str) -> None:
        """Log an entry and say it in one line."""


class Silent:
    """A Reporter that says nothing and keeps nothing."""

    def note(self, text: str) -> None:
        pass

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        yield from items

    def timed(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        yield from items

    def start(self, steps: int, epochs: int, done: int) -> None:
        pass

    def step(self, report: StepReport) -> None:
        pass

    def epoch(self, report: EpochReport) -> None:
        pass

    def event(self, entry: Mapping[str, object], text: str) -> None:
        pass
