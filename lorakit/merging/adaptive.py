"""Adaptive LoRA merge: train adapters jointly on the target data, and prune them at every step.

This is `merge --data`, from the loaded adapters to the written one. The stack that is trained is in
joint.py, pruning in criteria.py and pruner.py, the training loop in training/trainer.py, and the
search among several pruning settings in search.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import save_adapter
from lorakit.files import is_stream
from lorakit.merging.joint import Merge, prepare
from lorakit.merging.pruner import Pruner, shares_reset
from lorakit.merging.search import BUDGET, Candidate, Search, search_by_halving, search_grid
from lorakit.models.base import Base
from lorakit.reporting import Reporter
from lorakit.resume import SavedValues, path_beside, run_key
from lorakit.settings import LOSS, PruningSettings, SelectionSettings, TrainingSettings
from lorakit.training.checkpoint import Checkpoint, checkpoint_of
from lorakit.training.selection import MetricMeasure
from lorakit.training.train import train_and_save, trained_factors

Values = Sequence[Decimal] | Literal["auto"]
TENTHS = tuple(Decimal(tenth) / 10 for tenth in range(1, 10))


def merge_adaptively(
    adapters: Sequence[Adapter],
    base: Base,
    data: str,
    val: str | None,
    *,
    settings: TrainingSettings,
    pruning: PruningSettings,
    output: str,
    reporter: Reporter,
    resume: bool = False,
    values: Values = (),
    selection: SelectionSettings | None = None,
    portable: bool = False,
) -> list[dict[str, object]]:
    """Train the adapters jointly on the target data and write them to `output` as one adapter.

    Several `values`, which are ratios (thresholds, with unit `module`), are all tried, and the best
    on the validation set is written; `auto` is a halving search. Returns an entry for each value
    tried. Raises LorakitError for records, adapters or settings that cannot be used.
    """
    merge = prepare(
        adapters,
        base,
        data,
        val,
        settings=settings,
        selection=selection or SelectionSettings(),
        portable=portable,
        reporter=reporter,
    )
    if values == "auto" or len(values) > 1:
        return _search_and_write(
            merge, pruning, values, output=output, reporter=reporter, resume=resume
        )
    pruning = pruning.at(values[0]) if values else pruning
    entry = merge.entry(pruning)
    trainer = merge.trainer(pruning)
    train_and_save(
        trainer,
        merge.corpus,
        reporter,
        checkpoint=checkpoint_of(output, entry, base.record),
        resume=resume,
        export=lambda best: merge.export(trained_factors(best), entry, shares_reset(trainer)),
        output=output,
    )
    return []


def _search_and_write(
    merge: Merge,
    pruning: PruningSettings,
    values: Values,
    *,
    output: str,
    reporter: Reporter,
    resume: bool,
) -> list[dict[str, object]]:
    """Try several pruning settings, report each, and write the adapter of the best."""
    metric = merge.selection.search_metric
    measure = merge.measure(metric)
    is_main = merge.accelerator.is_main_process
    key = run_key(merge.entry(pruning), [str(value) for value in values], merge.base.record)
    side = path_beside(output, "search.resume")
    with SavedValues(side, resume=resume, writer="merge", writes=is_main, key=key) as saved:
        search = Search(
            merge.trainer,
            lambda trainer: (
                -trainer.losses.mean(merge.corpus.validation) if measure is None else measure()
            ),
            merge.corpus,
            reporter,
            by_epochs=metric == merge.selection.select_by,
            merges=BUDGET if values == "auto" else len(values),
            checkpoint_of=lambda setting: _candidate_checkpoint(merge, setting, output),
            saved=saved,
            resume=resume,
        )
        _run_search(search, pruning, values, saved, reporter)
        best = search.best()
        trials = [Trial.of(candidate, metric, candidate is best) for candidate in search.candidates]
        for trial in trials:
            reporter.event({"candidate": trial.name, **trial.fields()}, trial.line())
        reporter.note(_verdict(search.candidates, best, metric, measure))
        for note in best.trainer.notes():
            reporter.note(note)
        if is_main:
            _write_best(merge, best, metric, trials, output)
            search.remove_checkpoints()
    return [trial.fields() for trial in trials]


def _candidate_checkpoint(merge: Merge, setting: PruningSettings, output: str) -> Checkpoint:
    """Return the checkpoint of the run that tries a setting, beside `output`."""
    name = output if is_stream(output) else f"{output.rstrip('/')}.{setting.value}"
    return checkpoint_of(name, merge.entry(setting), merge.base.record)


def _run_search(
    search: Search,
    pruning: PruningSettings,
    values: Values,
    saved: SavedValues,
    reporter: Reporter,
) -> None:
    """Run the search that `values` ask for."""
    if values == "auto":
        rivals = _rivals(search, pruning, saved, reporter)
        search_by_halving(search, _named_setting(pruning.at(Decimal(0))), rivals)
    else:
        search_grid(search, [_named_setting(pruning.at(value)) for value in sorted(set(values))])


def _write_best(
    merge: Merge, best: Candidate, metric: str, trials: Sequence[Trial], output: str
) -> None:
    """Write the best candidate's adapter, with all trials in its history."""
    factors = trained_factors(best.trainer.best)
    tried = [trial.fields() for trial in trials]
    entry = merge.entry(best.pruning)
    entry["search"] = {"by": metric, "tried": tried}
    save_adapter(merge.export(factors, entry, shares_reset(best.trainer)), output)


def _named_setting(pruning: PruningSettings) -> tuple[str, PruningSettings]:
    """Return the name of a setting, its value, and the setting."""
    return str(pruning.value), pruning


def _rivals(
    search: Search, pruning: PruningSettings, saved: SavedValues, reporter: Reporter
) -> Callable[[Candidate], list[tuple[str, PruningSettings]]]:
    """Return the function that lists the settings a halving search tries, given the baseline."""

    def tenths(baseline: Candidate) -> list[tuple[str, PruningSettings]]:
        return [_named_setting(pruning.at(tenth)) for tenth in TENTHS]

    def quantiles(baseline: Candidate) -> list[tuple[str, PruningSettings]]:
        values = saved.find("thresholds", str, lambda: _thresholds(search, baseline, reporter))
        return [_named_setting(pruning.at(Decimal(value))) for value in values]

    return quantiles if pruning.by_threshold else tenths


def _thresholds(search: Search, baseline: Candidate, reporter: Reporter) -> list[str]:
    """Return the positive tenths of the mean importances after an epoch; report them all."""
    trainer = baseline.trainer
    search.go_to(baseline, trainer.steps // trainer.settings.epochs)
    trainer.load_weights_(baseline.parked)
    pruner = next(hook for hook in trainer.hooks if isinstance(hook, Pruner))
    means = torch.tensor(sorted(pruner.mean_importances().values()), dtype=torch.float64)
    tenths = torch.tensor([float(tenth) for tenth in TENTHS], dtype=torch.float64)
    values = [f"{value:.4g}" for value in torch.quantile(means, tenths).tolist()]
    entry = {
        "distribution": "mean importance of modules after the first epoch",
        "modules": len(means),
        "least": float(means[0]),
        "quantiles": dict(zip(map(str, TENTHS), map(float, values), strict=True)),
        "most": float(means[-1]),
    }
    text = ", ".join(f"{100 * t:.0f} %: {v}" for t, v in zip(TENTHS, values, strict=True))
    reporter.event(
        entry,
        f"mean importance of {len(means)} modules: {means[0]:.4g} to {means[-1]:.4g}; {text}",
    )
    return list(dict.fromkeys(value for value in values if float(value) > 0))


@dataclass(frozen=True)
class Trial:
    """What a search reports about a candidate: its setting, its steps and its value by `metric`.

    `value` keeps the sign of its metric: a lower loss is better.
    """

    name: str
    option: str
    amount: float
    steps: int
    metric: str
    value: float
    stopped: bool
    best: bool

    @classmethod
    def of(cls, candidate: Candidate, metric: str, is_best: bool) -> Trial:
        """Return the trial of a candidate."""
        return cls(
            candidate.name,
            candidate.pruning.amount_option,
            float(candidate.pruning.value),
            candidate.steps,
            metric,
            -candidate.value if metric == LOSS else candidate.value,
            candidate.stopped,
            is_best,
        )

    def fields(self) -> dict[str, object]:
        """Return the trial as it appears in the history, in the log and in a plot's data."""
        return {
            self.option: self.amount,
            "steps": self.steps,
            self.metric: self.value,
            "stopped": self.stopped,
            "best": self.best,
        }

    def line(self) -> str:
        """Return a line about the trial for the user."""
        mark = ", best" if self.best else ", stopped early" if self.stopped else ""
        text = f"{_words(self.option)} {self.amount}: {self.metric} {self.value:.4f}"
        return f"{text} after {self.steps} steps{mark}"


def _words(option: str) -> str:
    """Return a setting's name as words: `prune ratio`."""
    return option.replace("_", " ")


def _verdict(
    candidates: Sequence[Candidate], best: Candidate, metric: str, measure: MetricMeasure | None
) -> str:
    """Return a line about the outcome of the search and its cost."""
    steps = sum(candidate.steps for candidate in candidates)
    text = f"best by {metric}: {_words(best.pruning.amount_option)} {best.name}"
    if not best.pruning.prunes:
        text += ", so pruning does not help here"
    text += f"; {steps} training steps in all"
    return text + (f", {measure.generated} outputs generated to choose" if measure else "")
