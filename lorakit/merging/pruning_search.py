"""The search among pruning settings that a merge runs: the values it tries, and the best written.

How a search goes on is in search.py, and what it found, with the test of the best, in outcome.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Literal

import torch

from lorakit.adapters.history import HistoryEntry
from lorakit.adapters.storage import save_adapter
from lorakit.files import is_stream
from lorakit.merging.joint import Merge
from lorakit.merging.outcome import (
    Trial,
    Verdict,
    interval,
    judge_pruning,
    loss_statistics,
    words,
)
from lorakit.merging.pruner import Pruner, shares_reset
from lorakit.merging.search import BUDGET, Candidate, Search, search_by_ladder, search_grid
from lorakit.models.sharing import team_of
from lorakit.reporting import Reporter
from lorakit.runs.resume import SavedValues, completing, path_beside, run_key
from lorakit.runs.sole_writer import sole_writer
from lorakit.scoring.statistics import Statistics
from lorakit.settings import PruningSettings, SignificanceSettings
from lorakit.training.checkpoint import Checkpoint, checkpoint_of
from lorakit.training.lora_step import switch_dropout
from lorakit.training.train import trained_factors
from lorakit.training.trainer import Trainer

Values = Sequence[Decimal] | Literal["auto"]
TENTHS = tuple(Decimal(tenth) / 10 for tenth in range(1, 10))
# The places of the tenths in the order in which they matter where a merge has too few epochs to try
# them all: however many of the first are tried, they are spread, and little pruning comes first.
_PRIORITY = (0, 4, 2, 6, 8, 1, 3, 5, 7)


def search_and_write(
    merge: Merge,
    pruning: PruningSettings,
    values: Values,
    *,
    output: str,
    reporter: Reporter,
    resume: bool,
    checkpoint_every: int | None,
    intervals: bool,
) -> list[dict[str, object]]:
    """Try several pruning settings, report each, and write the adapter of the best."""
    metric = merge.selection.search_metric
    validation = _Validation(merge, metric)
    is_main = merge.accelerator.is_main_process
    key = run_key(merge.entry(pruning), [str(value) for value in values], merge.base.record)
    side = path_beside(output, "search.resume")
    reporter.describe(_search_entry(merge.entry(pruning), values))
    with (
        sole_writer(output, writes=is_main, adapter=True),
        SavedValues(side, resume=resume, writer="merge", writes=is_main, key=key) as saved,
    ):
        saved.values = team_of(merge.accelerator).from_first(saved.values)
        search = Search(
            merge.trainer,
            validation.value,
            merge.corpus,
            reporter,
            by_epochs=metric == merge.selection.select_by,
            merges=BUDGET if values == "auto" else len(values),
            checkpoint_of=lambda setting: _candidate_checkpoint(merge, setting, output),
            saved=saved,
            resume=resume,
            checkpoint_every=checkpoint_every,
        )
        _run_search(search, pruning, values, saved, reporter)
        best = search.best()
        trials = [Trial.of(candidate, metric, candidate is best) for candidate in search.candidates]
        for trial in trials:
            reporter.event({"candidate": trial.name, **trial.fields()}, trial.line())
        verdict = judge_pruning(
            search.candidates, best, validation.statistics, SignificanceSettings()
        )
        rows = [trial.fields() for trial in trials]
        if intervals:
            for row, candidate in zip(rows, search.candidates, strict=True):
                row["interval"] = interval(validation.statistics(candidate), SignificanceSettings())
        reporter.note(_conclusion(search.candidates, best, metric, verdict, validation.generated))
        for note in best.trainer.notes():
            reporter.note(note)
        if is_main:
            with completing(output, search.remove_checkpoints, saved.delete):
                _write_best(merge, best, metric, trials, verdict, output)
    return rows


def _search_entry(entry: HistoryEntry, values: Values) -> dict[str, object]:
    """Return the history entry of a search's first run with the values that are tried."""
    tried = values if values == "auto" else [float(value) for value in values]
    return {**entry, "settings": {**entry["settings"], "values": tried}}


class _Validation:
    """Measures candidates by a metric, or the loss, on the validation records at their best epochs.

    Outputs are generated once for each epoch; `generated` counts them.
    """

    def __init__(self, merge: Merge, metric: str) -> None:
        self._examples = merge.corpus.validation
        self._measure = merge.measure(metric)
        self._statistics: dict[tuple[str, int], Statistics] = {}

    @property
    def generated(self) -> int:
        return self._measure.generated if self._measure else 0

    def value(self, candidate: Candidate) -> float:
        """Return a candidate's value, higher is better."""
        if self._measure is not None:
            return self._measure.value_of(self.statistics(candidate))
        candidate.trainer.load_weights_(candidate.trainer.best)
        return -candidate.trainer.losses.mean(self._examples)

    def statistics(self, candidate: Candidate) -> Statistics:
        """Return what the single records say of a candidate."""
        key = (candidate.name, candidate.trainer.progress.best_epoch)
        if key not in self._statistics:
            candidate.trainer.load_weights_(candidate.trainer.best)
            with switch_dropout(candidate.trainer.layers, on=False):
                self._statistics[key] = self._compute(candidate.trainer)
        return self._statistics[key]

    def _compute(self, trainer: Trainer) -> Statistics:
        if self._measure is not None:
            return self._measure.statistics()
        targets = [example.targets for example in self._examples]
        return loss_statistics(trainer.losses.means(self._examples), targets)


def _conclusion(
    candidates: Sequence[Candidate],
    best: Candidate,
    metric: str,
    verdict: Verdict | None,
    generated: int,
) -> str:
    """Return a line about the outcome of the search and its cost."""
    steps = sum(candidate.steps for candidate in candidates)
    parts = [f"best by {metric}: {words(best.pruning.amount_option)} {best.name}"]
    if verdict is not None:
        parts.append(verdict.line())
    cost = f"{steps} training steps in all"
    if generated:
        cost += f", {generated} outputs generated to choose"
    return "; ".join([*parts, cost])


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
        search_by_ladder(search, _named_setting(pruning.at(Decimal(0))), rivals)
    else:
        search_grid(search, [_named_setting(pruning.at(value)) for value in sorted(set(values))])


def _write_best(
    merge: Merge,
    best: Candidate,
    metric: str,
    trials: Sequence[Trial],
    verdict: Verdict | None,
    output: str,
) -> None:
    """Write the best candidate's adapter, with all trials and the verdict in its history."""
    factors = trained_factors(best.trainer.best)
    tried = [trial.fields() for trial in trials]
    entry = merge.entry(best.pruning)
    test = {} if verdict is None else {"test": verdict.fields()}
    entry["search"] = {"by": metric, "tried": tried, **test}
    save_adapter(merge.export(factors, entry, shares_reset(best.trainer)), output)


def _named_setting(pruning: PruningSettings) -> tuple[str, PruningSettings]:
    """Return the name of a setting, its value, and the setting."""
    return str(pruning.value), pruning


def _rivals(
    search: Search, pruning: PruningSettings, saved: SavedValues, reporter: Reporter
) -> Callable[[Candidate], list[tuple[str, PruningSettings]]]:
    """Return the function that lists the settings a ladder search tries, given the baseline.

    They come in the order of their priority.
    """

    def values(baseline: Candidate) -> list[Decimal]:
        if not pruning.by_threshold:
            return list(TENTHS)
        texts = saved.find("thresholds", str, lambda: _thresholds(search, baseline, reporter))
        return [Decimal(text) for text in texts]

    def settings(baseline: Candidate) -> list[tuple[str, PruningSettings]]:
        tenths = values(baseline)
        places = [place for place in _PRIORITY if place < len(tenths)]
        return [_named_setting(pruning.at(tenths[place])) for place in places]

    return settings


def _thresholds(search: Search, baseline: Candidate, reporter: Reporter) -> list[str]:
    """Return the positive tenths of the mean importances after an epoch; report them all."""
    trainer = baseline.trainer
    search.go_to(baseline, 1)
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
