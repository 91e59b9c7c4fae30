"""Choose how much to prune: try several merges from the same start, all to the end or by a ladder.

Every candidate begins with the same weights, seed, data and first input norms, and is parked while
another trains; it can stop after any epoch and go on to the same bytes. Cost is counted in
optimiser steps. How a candidate trains is in training/trainer.py; what its hooks do is not known
here, and what the outcome means is said in outcome.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from lorakit.reporting import EpochReport, Reporter, StepReport
from lorakit.runs.resume import SavedValues
from lorakit.settings import PruningSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.step_hook import State
from lorakit.training.train import Corpus, check_same_run, idle_note
from lorakit.training.trainer import Trainer, Weights

BUDGET = 4.5  # the optimiser steps of a ladder search, as a multiple of its baseline's


@dataclass
class Candidate:
    """A pruning setting and the run that tries it.

    `value`, higher is better, is that of its best epoch so far, after `steps` optimiser steps;
    `ended` says that its training is over, `stopped` that the search ended it early. `parked` are
    its weights while another candidate trains.
    """

    name: str
    pruning: PruningSettings
    trainer: Trainer
    checkpoint: Checkpoint
    parked: Weights
    value: float = -math.inf
    steps: int = 0
    ended: bool = False
    stopped: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether it was not stopped early, and had an epoch with a finite loss."""
        return not self.stopped and self.value > -math.inf


class Search:
    """Trains candidates in turn on the one model that they share.

    `evaluate` returns the value, higher is better, of a candidate's best weights; `by_epochs` says
    that trainers compare their epochs by the same value; `merges` bounds the cost in whole merges,
    for the progress bar. `saved` stores measured values for a resumed search, in which candidates
    go on from their checkpoints: of epochs, and of every `checkpoint_every` steps.
    """

    def __init__(
        self,
        new_trainer: Callable[[PruningSettings], Trainer],
        evaluate: Callable[[Candidate], float],
        corpus: Corpus,
        reporter: Reporter,
        *,
        by_epochs: bool,
        merges: float,
        checkpoint_of: Callable[[PruningSettings], Checkpoint],
        saved: SavedValues,
        resume: bool,
        checkpoint_every: int | None = None,
    ) -> None:
        self._new_trainer, self._evaluate, self._by_epochs = new_trainer, evaluate, by_epochs
        self._corpus, self._reporter, self._merges = corpus, reporter, merges
        self._checkpoint_of, self._saved, self._resume = checkpoint_of, saved, resume
        self._checkpoint_every = checkpoint_every
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
        check_same_run(trainer.losses.team, candidate.checkpoint.key, trainer.progress.step)
        if not restored:
            trainer.restore_hooks_(self._start_states)
        reporter = _CandidateReporter(self._reporter, name)
        trainer.begin(self._corpus.train, self._corpus.validation, reporter)
        if not restored:
            self._start_states = {**trainer.hook_states(), **self._start_states}
        if not self.candidates:
            if note := idle_note(trainer, self._corpus.train):
                self._reporter.note(note)
            steps = int(self._merges * trainer.steps)
            self._reporter.start(steps, trainer.settings.epochs, trainer.progress.step)
        candidate.parked = trainer.weights()
        self.candidates.append(candidate)
        return candidate

    def go_to(self, candidate: Candidate, epoch: int | None = None) -> None:
        """Train a candidate to the end of an epoch, or to its own end if that comes first."""
        if not _has_to_train(candidate.trainer, epoch):
            return
        _unpark(candidate)
        trainer, checkpoint = candidate.trainer, candidate.checkpoint
        with checkpoint.saving_at_end_of(trainer):
            while _has_to_train(trainer, epoch):
                trainer.advance(trainer.next_multiple(self._checkpoint_every))
                checkpoint.save(trainer)
        _park(candidate)

    def judge(self, candidate: Candidate, epoch: int | None = None) -> None:
        """Train a candidate as `go_to` does, and set its value, its steps and whether it ended.

        These are saved: a resumed search, in which the candidate may have come further already,
        decides by what was true at the time.
        """
        self.go_to(candidate, epoch)
        trainer = candidate.trainer

        def measure() -> list[float]:
            return [self._value(candidate), trainer.progress.step, trainer.is_done]

        name = f"{candidate.name} {'at its end' if epoch is None else f'after epoch {epoch}'}"
        value, steps, ended = self._saved.find(name, float, lambda: list(map(float, measure())))
        candidate.value, candidate.steps, candidate.ended = value, int(steps), bool(ended)

    def _value(self, candidate: Candidate) -> float:
        """Return the value of a candidate's best epoch so far; -inf if there is none."""
        trainer = candidate.trainer
        if not trainer.has_result:
            return -math.inf
        if self._by_epochs:
            return trainer.progress.best_value
        name = f"{candidate.name} at its best epoch {trainer.progress.best_epoch}"

        def measure() -> list[float]:
            return [trainer.value(lambda: self._evaluate(candidate))]

        return self._saved.find(name, float, measure)[0]

    def best(self) -> Candidate:
        """Return the candidate with the highest value; of equals, the first.

        Raises LorakitError if no candidate had an epoch with a finite loss.
        """
        complete = [candidate for candidate in self.candidates if candidate.is_complete]
        if not complete:
            self.candidates[0].trainer.check_best()
        return max(complete, key=lambda candidate: candidate.value)

    def remove_checkpoints(self) -> None:
        """Delete the candidates' checkpoints, once the search is done."""
        for candidate in self.candidates:
            candidate.checkpoint.remove()


def search_grid(search: Search, settings: Sequence[tuple[str, PruningSettings]]) -> None:
    """Train every setting to its end."""
    for name, pruning in settings:
        search.judge(search.add(name, pruning))


def search_by_ladder(
    search: Search,
    baseline: tuple[str, PruningSettings],
    rivals: Callable[[Candidate], Sequence[tuple[str, PruningSettings]]],
) -> None:
    """Train the baseline, which prunes nothing, to its end, and its rivals epoch by epoch.

    The baseline is one merge, of M steps. Before the first epoch, and after every one, as many
    rivals go on, the best so far, as leave enough of BUDGET·M steps to halve them after each
    further epoch, down to one that reaches the epoch at which the baseline ended. What is left in
    the end goes to those whose training is not over. Early orders are the least reliable, so this
    stops rivals as late as the budget allows. `rivals` lists the settings to try, those that matter
    most first; the baseline is passed to it at its start. Source: successive halving (Jamieson and
    Talwalkar, 2016), postponed.
    """
    unpruned = search.add(*baseline)
    settings = rivals(unpruned)
    search.judge(unpruned)
    steps_an_epoch = unpruned.trainer.steps // unpruned.trainer.settings.epochs
    epochs = unpruned.steps // steps_an_epoch
    left = int((BUDGET - 1) * unpruned.steps) // steps_an_epoch  # in epochs of rivals
    entrants = sorted(settings[: _affordable(left, epochs)], key=lambda rival: rival[1].value)
    going = [search.add(*entrant) for entrant in entrants]
    for epoch in itertools.count(1):
        for rival in going:
            search.judge(rival, epoch)
        left -= len(going)
        going = sorted((r for r in going if not r.ended), key=lambda rival: -rival.value)
        affordable = _affordable(left, epochs - epoch)
        for rival in going[affordable:]:
            rival.stopped = epoch < epochs
        going = going[:affordable]
        if not going:
            return


def _affordable(left: int, to_go: int) -> int:
    """Return how many rivals can train another epoch out of `left` epochs of rivals.

    Afterwards they can still be halved after each epoch, to at least one, for `to_go` epochs in
    all.
    """
    affordable = 0
    while _halving_cost(affordable + 1, to_go) <= left:
        affordable += 1
    return affordable


def _halving_cost(rivals: int, epochs: int) -> int:
    """Return the epochs of rivals that it takes to halve them after each of so many epochs."""
    return sum(math.ceil(rivals / 2**epoch) for epoch in range(max(1, epochs)))


def _has_to_train(trainer: Trainer, epoch: int | None) -> bool:
    """Return whether a trainer has to go on to reach the end of an epoch, or its end for None."""
    return not trainer.is_done and (epoch is None or trainer.progress.epoch < epoch)


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
        self.describe = reporter.describe
        self.event = reporter.event

    def start(self, steps: int, epochs: int, done: int) -> None:
        """Do nothing: the search has announced all of its runs together."""

    def step(self, report: StepReport) -> None:
        self._reporter.step(replace(report, candidate=self._name))

    def epoch(self, report: EpochReport) -> None:
        self._reporter.epoch(replace(report, candidate=self._name))
