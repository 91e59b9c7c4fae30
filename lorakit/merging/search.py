"""Choosing how much to prune: several merges from one start, run out one by one or halved.

Every candidate begins with the same weights, seed, data and first calibration, and is parked while
another trains: it can stop after any step and go on to the same bytes. The clock is optimiser
steps. What a candidate's own training is stands in trainer.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.files import atomic_path
from lorakit.merging.input_norms import InputNorms
from lorakit.settings import PruningSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.train import Corpus
from lorakit.training.trainer import Trainer, Watcher, Weights

BUDGET = 3.5  # the optimiser steps of a halving search, in those of its candidate 0
RUNGS = (0.1, 0.2, 0.4)  # where the worse half of the rivals stops, likewise
_FEWEST_STEPS = 5


@dataclass
class Candidate:
    """One setting and the run that tries it.

    `value`, higher better, is of its best epoch, or of the weights with which it was given up.
    """

    name: str
    pruning: PruningSettings
    trainer: Trainer
    checkpoint: Checkpoint
    parked: Weights
    value: float = -math.inf
    is_out: bool = False

    @property
    def steps(self) -> int:
        return self.trainer.progress.step


@dataclass
class Record:
    """What a search has measured, kept beside the output so that a resumed one need not again."""

    path: Path | None
    key: str
    writes: bool = True  # of several processes only the main one
    known: dict[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """Take over what a killed search with the same key has measured."""
        if self.path is not None and self.path.exists():
            told = json.loads(self.path.read_text())
            self.known = told["known"] if told["key"] == self.key else {}

    def keep(self, name: str, find: Callable[[], Any]) -> Any:
        """Return what is known by this name, else find it out and write it down."""
        if name not in self.known:
            self.known[name] = find()
            if self.path is not None and self.writes:
                with atomic_path(self.path) as side:
                    side.write_text(json.dumps({"key": self.key, "known": self.known}))
        return self.known[name]

    def remove(self) -> None:
        """Delete the file: the search is done."""
        if self.path is not None and self.writes:
            self.path.unlink(missing_ok=True)


class Search:
    """Trains candidates by turns on the one model that they share.

    `judge` returns the value, higher better, of the weights a trainer has in the model;
    `by_epochs` says that a trainer compares its epochs by that same value; `merges` is how many
    whole merges there will be at most, for the progress bar.
    """

    def __init__(
        self,
        new_trainer: Callable[[PruningSettings], Trainer],
        judge: Callable[[Trainer], float],
        corpus: Corpus,
        watcher: Watcher,
        *,
        by_epochs: bool,
        merges: float,
        checkpoint_of: Callable[[PruningSettings], Checkpoint],
        record: Record,
        resume: bool,
    ) -> None:
        self._new_trainer, self._judge, self._by_epochs = new_trainer, judge, by_epochs
        self._corpus, self._watcher, self._merges = corpus, watcher, merges
        self._checkpoint_of, self._record, self._resume = checkpoint_of, record, resume
        self._start: Weights = {}
        self._first_norms: InputNorms | None = None
        self.candidates: list[Candidate] = []
        if resume:
            record.load()

    def add(self, name: str, pruning: PruningSettings) -> Candidate:
        """Return a new candidate, at the common start or where a killed search has left it."""
        if self.candidates:
            self.candidates[0].trainer.put(self._start)
        trainer = self._new_trainer(pruning)
        self._start = self._start or trainer.weights()
        candidate = Candidate(name, pruning, trainer, self._checkpoint_of(pruning), self._start)
        restored = self._resume and candidate.checkpoint.restore_(trainer)
        if self._first_norms is not None and not restored:
            trainer.norms.take_over_(self._first_norms)
        trainer.begin(self._corpus.train, self._corpus.validation, _Tagged(self._watcher, name))
        if self._first_norms is None and not restored and trainer.norms.version:
            self._first_norms = InputNorms(trainer.layers)
            self._first_norms.take_over_(trainer.norms)
        if not self.candidates:
            steps = int(self._merges * trainer.steps)
            self._watcher.start(steps, trainer.settings.epochs, trainer.progress.step)
        candidate.parked = trainer.weights()
        self.candidates.append(candidate)
        return candidate

    def go_to(self, candidate: Candidate, step: int | None = None) -> None:
        """Train a candidate to a step, or to its own end."""
        trainer = candidate.trainer
        if trainer.is_done or (step is not None and trainer.progress.step >= step):
            return
        _unpark(candidate)
        while not trainer.is_done and (step is None or trainer.progress.step < step):
            epoch = trainer.progress.epoch
            trainer.advance(until=step)
            if trainer.progress.epoch > epoch and trainer.accelerator.is_main_process:
                candidate.checkpoint.save(trainer)
        _park(candidate)

    def value_at(self, candidate: Candidate, step: int) -> int:
        """Value a candidate trained to a step, or to its end if that comes first; return which."""

        def find() -> tuple[float, int]:
            self.go_to(candidate, step)
            candidate.trainer.put(candidate.parked)
            return self._measured(candidate.trainer), candidate.steps

        candidate.value, reached = self._record.keep(f"{candidate.name} at {step}", find)
        return int(reached)

    def _measured(self, trainer: Trainer) -> float:
        return trainer.measured(lambda: self._judge(trainer))

    def finish(self, candidate: Candidate, cap: int | None = None) -> None:
        """Train a candidate to its end, or to step `cap`, and value its best epoch."""
        self.go_to(candidate, cap)
        trainer = candidate.trainer

        def find() -> float:
            if self._by_epochs:
                return trainer.progress.best_value
            trainer.put(trainer.best)
            return self._measured(trainer)

        if trainer.progress.best_epoch:
            candidate.value = self._record.keep(f"{candidate.name} at its best", find)
        else:
            candidate.is_out = True

    def best(self) -> Candidate:
        """Return the candidate of the highest value, of equals the first; check that it has one."""
        running = [candidate for candidate in self.candidates if not candidate.is_out]
        if not running:
            self.candidates[0].trainer.check()
        return max(running, key=lambda candidate: candidate.value)

    def remember(self, name: str, find: Callable[[], Any]) -> Any:
        """Return what a killed search had found under this name, else find it."""
        return self._record.keep(name, find)

    def remove(self) -> None:
        """Delete what was kept for a resumed search."""
        self._record.remove()
        for candidate in self.candidates:
            candidate.checkpoint.remove()


def search_grid(search: Search, settings: Sequence[tuple[str, PruningSettings]]) -> None:
    """Run every setting to its own end."""
    for name, pruning in settings:
        search.finish(search.add(name, pruning))


def search_by_halving(
    search: Search,
    baseline: tuple[str, PruningSettings],
    rivals: Callable[[Candidate], Sequence[tuple[str, PruningSettings]]],
) -> None:
    """Run the baseline, which prunes nothing, to its end and halve its rivals on the way.

    The baseline is one merge of M steps. At each rung the better half of the rivals goes on, and
    the last one to its end; all together take at most BUDGET·M steps. Successive halving: Jamieson
    and Talwalkar, 2016. Raises LorakitError where M is too small to share out.
    """
    first = search.add(*baseline)
    field_of_rivals = rivals(first)
    search.finish(first)
    once = first.steps
    if once < _FEWEST_STEPS:
        raise LorakitError(
            f"a merge of {once} optimiser steps cannot be halved; give the values to try, more "
            "--epochs or a smaller --batch-size"
        )
    running = [search.add(*rival) for rival in field_of_rivals]
    reached = {candidate.name: 0 for candidate in running}
    left = int((BUDGET - 1) * once)
    for rung in (max(1, int(share * once)) for share in RUNGS):
        for candidate in running:
            before = reached[candidate.name]
            reached[candidate.name] = search.value_at(candidate, rung)
            left -= reached[candidate.name] - before
        running.sort(key=lambda candidate: -candidate.value)
        for candidate in running[max(1, len(running) // 2) :]:
            candidate.is_out = True
        running = running[: max(1, len(running) // 2)]
    search.finish(running[0], cap=reached[running[0].name] + left)


def _park(candidate: Candidate) -> None:
    candidate.parked = candidate.trainer.weights()
    _move_moments(candidate.trainer, "cpu")


def _unpark(candidate: Candidate) -> None:
    candidate.trainer.put(candidate.parked)
    _move_moments(candidate.trainer, candidate.trainer.base.device)


def _move_moments(trainer: Trainer, device: Any) -> None:
    for state in trainer.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(device)


class _Tagged:
    """Passes what a candidate's run tells on, with the candidate's name."""

    def __init__(self, watcher: Watcher, name: str) -> None:
        self._watcher, self._name = watcher, name
        self.note = watcher.note
        self.event = watcher.event

    def start(self, steps: int, epochs: int, done: int) -> None:
        """Say nothing: the search has said it for all of its runs."""

    def step(self, entry: Mapping[str, Any]) -> None:
        self._watcher.step({"candidate": self._name, **entry})

    def epoch(self, entry: Mapping[str, Any]) -> None:
        self._watcher.epoch({"candidate": self._name, **entry})
