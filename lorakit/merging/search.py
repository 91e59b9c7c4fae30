"""Choose how much to prune: try several merges from the same start, all to the end or by halving.

Every candidate begins with the same weights, seed, data and first input norms, and is parked while
another trains; it can stop after any step and go on to the same bytes. Cost is counted in optimiser
steps. How a candidate trains is in training/trainer.py; what its hooks do is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lorakit.errors import LorakitError
from lorakit.reporting import EpochReport, Reporter, StepReport
from lorakit.resume import SavedValues
from lorakit.settings import PruningSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.step_hook import State
from lorakit.training.train import Corpus
from lorakit.training.trainer import Trainer, Weights

BUDGET = 3.5  # the optimiser steps of a halving search, as a multiple of its baseline's
RUNGS = (0.1, 0.2, 0.4)  # when the worse half of the rivals stops, likewise
_FEWEST_STEPS = 5


@dataclass
class Candidate:
    """A pruning setting and the run that tries it.

    `value`, higher is better, is that of its best epoch, or of its weights when it was stopped;
    `parked` are its weights while another candidate trains.
    """

    name: str
    pruning: PruningSettings
    trainer: Trainer
    checkpoint: Checkpoint
    parked: Weights
    value: float = -math.inf
    stopped: bool = False
    saved_steps: int = 0  # reached in a killed search, which saved only these and the value

    @property
    def steps(self) -> int:
        """The number of optimiser steps that this candidate has taken."""
        return max(self.trainer.progress.step, self.saved_steps)


class Search:
    """Trains candidates in turn on the one model that they share.

    `evaluate` returns the value, higher is better, of a trainer's weights while they are in the
    model; `by_epochs` says that trainers compare their epochs by the same value; `merges` bounds
    the cost in whole merges, for the progress bar. `saved` stores measured values for a resumed
    search.
    """

    def __init__(
        self,
        new_trainer: Callable[[PruningSettings], Trainer],
        evaluate: Callable[[Trainer], float],
        corpus: Corpus,
        reporter: Reporter,
        *,
        by_epochs: bool,
        merges: float,
        checkpoint_of: Callable[[PruningSettings], Checkpoint],
        saved: SavedValues,
        resume: bool,
    ) -> None:
        self._new_trainer, self._evaluate, self._by_epochs = new_trainer, evaluate, by_epochs
        self._corpus, self._reporter, self._merges = corpus, reporter, merges
        self._checkpoint_of, self._saved, self._resume = checkpoint_of, saved, resume
        self._start: Weights = {}
        self._start_states: dict[str, State] = {}  # of the hooks, at the common start
        self.candidates: list[Candidate] = []

    def add(self, name: str, pruning: PruningSettings) -> Candidate:
        """Return a new candidate, at the common start or where a killed search left it."""
        if self.candidates:
            self.candidates[0].trainer.load_weights_(self._start)
        trainer = self._new_trainer(pruning)
        self._start = self._start or trainer.weights()
        candidate = Candidate(name, pruning, trainer, self._checkpoint_of(pruning), self._start)
        if trainer.accelerator.is_main_process and not self._resume:
            candidate.checkpoint.remove()  # another search's
        restored = self._resume and candidate.checkpoint.restore_(trainer)
        if not restored:
            trainer.restore_hooks_(self._start_states)
        reporter = _CandidateReporter(self._reporter, name)
        trainer.begin(self._corpus.train, self._corpus.validation, reporter)
        if not restored:
            self._start_states = {**trainer.hook_states(), **self._start_states}
        if not self.candidates:
            steps = int(self._merges * trainer.steps)
            self._reporter.start(steps, trainer.settings.epochs, trainer.progress.step)
        candidate.parked = trainer.weights()
        self.candidates.append(candidate)
        return candidate

    def go_to(self, candidate: Candidate, step: int | None = None) -> None:
        """Train a candidate to a step, or to its end if `step` is None or beyond it."""
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
        """Train a candidate to a step, or to its end if that comes first, and set its value.

        Returns the number of steps it has taken.
        """

        def measure() -> list[float]:
            self.go_to(candidate, step)
            candidate.trainer.load_weights_(candidate.parked)
            return [self._value(candidate.trainer), float(candidate.steps)]

        name = f"{candidate.name} at {step}"
        candidate.value, reached = self._saved.find(name, float, measure)
        candidate.saved_steps = int(reached)
        return candidate.saved_steps

    def _value(self, trainer: Trainer) -> float:
        return trainer.value(lambda: self._evaluate(trainer))

    def finish(self, candidate: Candidate, cap: int | None = None) -> None:
        """Train a candidate to its end, or to step `cap`, and set its value from its best epoch."""
        self.go_to(candidate, cap)
        trainer = candidate.trainer

        def measure() -> list[float]:
            if self._by_epochs:
                return [trainer.progress.best_value]
            trainer.load_weights_(trainer.best)
            return [self._value(trainer)]

        if trainer.has_result:
            name = f"{candidate.name} at its best"
            (candidate.value,) = self._saved.find(name, float, measure)
        else:
            candidate.stopped = True

    def best(self) -> Candidate:
        """Return the candidate with the highest value; of equals, the first.

        Raises LorakitError if no candidate had an epoch with a finite loss.
        """
        running = [candidate for candidate in self.candidates if not candidate.stopped]
        if not running:
            self.candidates[0].trainer.check_best()
        return max(running, key=lambda candidate: candidate.value)

    def remove_checkpoints(self) -> None:
        """Delete the candidates' checkpoints, once the search is done."""
        for candidate in self.candidates:
            candidate.checkpoint.remove()


def search_grid(search: Search, settings: Sequence[tuple[str, PruningSettings]]) -> None:
    """Train every setting to its end."""
    for name, pruning in settings:
        search.finish(search.add(name, pruning))


def search_by_halving(
    search: Search,
    baseline: tuple[str, PruningSettings],
    rivals: Callable[[Candidate], Sequence[tuple[str, PruningSettings]]],
) -> None:
    """Train the baseline, which prunes nothing, to its end, and its rivals by successive halving.

    The baseline is one merge of M steps. At each rung the better half of the rivals goes on, and
    the last rival is trained to its end; all of them take at most BUDGET·M steps (Jamieson and
    Talwalkar, 2016). Raises LorakitError if M is too small to be divided.
    """
    unpruned = search.add(*baseline)
    rival_settings = rivals(unpruned)
    search.finish(unpruned)
    steps = unpruned.steps
    if steps < _FEWEST_STEPS:
        raise LorakitError(
            f"a merge of {steps} optimiser steps cannot be halved; give the values to try, more "
            "--epochs or a smaller --batch-size"
        )
    running = [search.add(*rival) for rival in rival_settings]
    reached = {candidate.name: 0 for candidate in running}
    left = int((BUDGET - 1) * steps)
    for rung in (max(1, int(share * steps)) for share in RUNGS):
        for candidate in running:
            before = reached[candidate.name]
            reached[candidate.name] = search.value_at(candidate, rung)
            left -= reached[candidate.name] - before
        running.sort(key=lambda candidate: -candidate.value)
        for candidate in running[max(1, len(running) // 2) :]:
            candidate.stopped = True
        running = running[: max(1, len(running) // 2)]
    search.finish(running[0], cap=reached[running[0].name] + left)


def _park(candidate: Candidate) -> None:
    """Copy a candidate's weights out of the model, and move its moments to the CPU."""
    candidate.parked = candidate.trainer.weights()
    _move_moments(candidate.trainer, "cpu")


def _unpark(candidate: Candidate) -> None:
    """Put a candidate's weights back into the model, and its moments onto the device."""
    candidate.trainer.load_weights_(candidate.parked)
    _move_moments(candidate.trainer, candidate.trainer.base.device)


def _move_moments(trainer: Trainer, device: torch.device | str) -> None:
    for state in trainer.optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(device)


class _CandidateReporter:
    """Passes on what a candidate's run reports, with the candidate's name added."""

    def __init__(self, reporter: Reporter, name: str) -> None:
        self._reporter, self._name = reporter, name
        self.note = reporter.note
        self.track = reporter.track
        self.timed = reporter.timed
        self.event = reporter.event

    def start(self, steps: int, epochs: int, done: int) -> None:
        """Do nothing: the search has announced all of its runs together."""

    def step(self, report: StepReport) -> None:
        self._reporter.step(replace(report, candidate=self._name))

    def epoch(self, report: EpochReport) -> None:
        self._reporter.epoch(replace(report, candidate=self._name))
