"""What the library reports while it works: notes, progress, and log lines.

The library prints nothing. Every long-running function takes a Reporter. The commands pass one that
writes to stderr and to `--log` (commands/_progress.py); Silent is for everyone else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar

T = TypeVar("T")
Measurements = Mapping[str, float | None]  # by the names of their fields in a log line


@dataclass(frozen=True)
class StepReport:
    """One optimiser step; `train_loss` in nats per token, `grad_norm` before clipping.

    `measurements` are what the trainer's hooks measured; `candidate` names the run when a search
    trains several.
    """

    step: int
    epoch: int
    train_loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    measurements: Measurements = field(default_factory=dict)
    candidate: str | None = None

    def log_entry(self) -> dict[str, object]:
        """Return the fields of the log line: the candidate first, measurements last."""
        fields = asdict(self)
        measurements = fields.pop("measurements")
        return _log_entry({**fields, **measurements}, self.candidate)


@dataclass(frozen=True)
class EpochReport:
    """One epoch and its validation; losses in nats per token.

    `validation_score` is the metric of `--select-by`, None if that is the loss.
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
        """Return the fields of the log line: the candidate first, `seconds` last."""
        fields = asdict(self)
        seconds, score = fields.pop("seconds"), fields.pop("validation_score")
        if score is not None:
            fields["validation_score"] = score
        return _log_entry({**fields, "seconds": seconds}, self.candidate)


def _log_entry(fields: dict[str, object], candidate: str | None) -> dict[str, object]:
    """Return the fields with the candidate moved to the front, or left out if there is none."""
    del fields["candidate"]
    return fields if candidate is None else {"candidate": candidate, **fields}


class Reporter(Protocol):
    """Receives the notes, progress and log entries of a long run."""

    def note(self, text: str) -> None:
        """Show the user one line; a text that begins with `Warning: ` is a warning."""

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, showing how many are done."""
        ...

    def timed(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """Yield the items, showing how many are done and the time left."""
        ...

    def describe(self, entry: Mapping[str, object]) -> None:
        """Receive the history entry of the run that is about to start: command and settings."""

    def start(self, steps: int, epochs: int, done: int) -> None:
        """Announce a run of `steps` optimiser steps in all, of which `done` are already taken."""

    def step(self, report: StepReport) -> None:
        """Report an optimiser step."""

    def epoch(self, report: EpochReport) -> None:
        """Report the end of an epoch."""

    def event(self, entry: Mapping[str, object], text: str) -> None:
        """Log `entry` and show the user `text`, the same in one line."""


class Silent:
    """A Reporter that ignores everything."""

    def note(self, text: str) -> None:
        pass

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        yield from items

    def timed(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        yield from items

    def describe(self, entry: Mapping[str, object]) -> None:
        pass

    def start(self, steps: int, epochs: int, done: int) -> None:
        pass

    def step(self, report: StepReport) -> None:
        pass

    def epoch(self, report: EpochReport) -> None:
        pass

    def event(self, entry: Mapping[str, object], text: str) -> None:
        pass
