"""Adaptive LoRA merge: adapters trained jointly on the target data, pruned at every step.

What trains is in joint.py, pruning in criteria.py and pruner.py, the loop in trainer.py; trying
several pruning settings and keeping the best goes through search.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import save_adapter
from lorakit.files import is_stream
from lorakit.merging.joint import Merge, prepare
from lorakit.merging.search import BUDGET, Candidate, Record, Search, search_by_halving, search_grid
from lorakit.models.base import Base
from lorakit.settings import LOSS, PruningSettings, SelectionSettings, TrainingSettings
from lorakit.training.checkpoint import Checkpoint, checkpoint_of
from lorakit.training.selection import Measured
from lorakit.training.train import fit
from lorakit.training.trainer import Watcher

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
    watcher: Watcher,
    resume: bool = False,
    values: Values = (),
    selection: SelectionSettings | None = None,
    portable: bool = False,
) -> list[dict[str, Any]]:
    """Train the adapters jointly on the target data and write them to `output` as one adapter.

    Of several `values`, ratios (thresholds, with unit `module`), the best on the validation set is
    kept; `auto` is a halving search. Returns an entry for each that was tried.
    Raises LorakitError for records, adapters or settings that cannot be used.
    """
    merge = prepare(
        adapters,
        base,
        data,
        val,
        settings=settings,
        selection=selection or SelectionSettings(),
        portable=portable,
        watcher=watcher,
    )
    if values == "auto" or len(values) > 1:
        return _choose(merge, pruning, values, output=output, watcher=watcher, resume=resume)
    pruning = pruning.at(values[0]) if values else pruning
    entry = merge.entry(pruning)
    fit(
        merge.trainer(pruning),
        merge.corpus,
        watcher,
        checkpoint=checkpoint_of(output, entry, base.record),
        resume=resume,
        export=lambda best: merge.export(best, entry),
        output=output,
    )
    return []


def _choose(
    merge: Merge,
    pruning: PruningSettings,
    values: Values,
    *,
    output: str,
    watcher: Watcher,
    resume: bool,
) -> list[dict[str, Any]]:
    """Try several pruning settings, write the best one's adapter, and tell of each."""
    metric = merge.selection.searches_by
    measure = merge.measure(metric)

    def kept(setting: PruningSettings) -> Checkpoint:
        name = f"{output.rstrip('/')}.{setting.value}" if not is_stream(output) else output
        return checkpoint_of(name, merge.entry(setting), merge.base.record)

    search = Search(
        merge.trainer,
        lambda trainer: (
            -trainer.losses.mean(merge.corpus.validation) if measure is None else measure()
        ),
        merge.corpus,
        watcher,
        by_epochs=metric == merge.selection.select_by,
        merges=BUDGET if values == "auto" else len(values),
        checkpoint_of=kept,
        record=_record(merge, pruning, values, output),
        resume=resume,
    )
    if values == "auto":
        search_by_halving(search, _named(pruning.at(Decimal(0))), _rivals(search, pruning, watcher))
    else:
        search_grid(search, [_named(pruning.at(value)) for value in sorted(set(values))])
    chosen = search.best()
    told = [_told(candidate, metric, candidate is chosen) for candidate in search.candidates]
    for one in told:
        watcher.event({"candidate": one.pop("name"), **one}, _line(one, metric))
    watcher.note(_verdict(search.candidates, chosen, metric, measure))
    if merge.accelerator.is_main_process:
        best = {name: (a.numpy(), b.numpy()) for name, (a, b) in chosen.trainer.best.items()}
        entry = {**merge.entry(chosen.pruning), "search": {"by": metric, "tried": told}}
        save_adapter(merge.export(best, entry), output)
        search.remove()
    return told


def _record(merge: Merge, pruning: PruningSettings, values: Values, output: str) -> Record:
    shaping = [merge.entry(pruning), [str(value) for value in values], merge.base.record]
    key = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
    path = None if is_stream(output) else Path(f"{output.rstrip('/')}.search.resume")
    return Record(path, key, writes=merge.accelerator.is_main_process)


def _named(pruning: PruningSettings) -> tuple[str, PruningSettings]:
    return str(pruning.value), pruning


def _rivals(search: Search, pruning: PruningSettings, watcher: Watcher) -> Any:
    """Return what names the settings that a halving search tries against no pruning."""

    def tenths(baseline: Candidate) -> list[tuple[str, PruningSettings]]:
        return [_named(pruning.at(tenth)) for tenth in TENTHS]

    def quantiles(baseline: Candidate) -> list[tuple[str, PruningSettings]]:
        """Take the tenths of the modules' mean importance after the first epoch."""
        found = search.remember("thresholds", lambda: _thresholds(search, baseline, watcher))
        return [_named(pruning.at(Decimal(value))) for value in found]

    return quantiles if pruning.unit == "module" else tenths


def _thresholds(search: Search, baseline: Candidate, watcher: Watcher) -> list[str]:
    trainer = baseline.trainer
    search.go_to(baseline, trainer.steps // trainer.settings.epochs)
    trainer.put(baseline.parked)
    assert trainer.pruner is not None
    means = torch.tensor(sorted(trainer.pruner.means(trainer.norms).values()), dtype=torch.float64)
    tenths = torch.tensor([float(tenth) for tenth in TENTHS], dtype=torch.float64)
    found = [f"{value:.4g}" for value in torch.quantile(means, tenths).tolist()]
    event = {
        "distribution": "mean importance of modules after the first epoch",
        "modules": len(means),
        "least": float(means[0]),
        "quantiles": dict(zip(map(str, TENTHS), map(float, found), strict=True)),
        "most": float(means[-1]),
    }
    text = ", ".join(f"{100 * t:.0f} %: {v}" for t, v in zip(TENTHS, found, strict=True))
    watcher.event(
        event,
        f"mean importance of {len(means)} modules: {means[0]:.4g} to {means[-1]:.4g}; {text}",
    )
    return list(dict.fromkeys(value for value in found if float(value) > 0))


def _told(candidate: Candidate, metric: str, is_best: bool) -> dict[str, Any]:
    """Return what is told of a candidate: its setting, steps and value; the loss as it is."""
    value = -candidate.value if metric == LOSS else candidate.value
    return {
        "name": candidate.name,
        candidate.pruning.chooses: float(candidate.pruning.value),
        "steps": candidate.steps,
        metric: value,
        "stopped": candidate.is_out,
        "best": is_best,
    }


def _line(one: Mapping[str, Any], metric: str) -> str:
    (option, value), *_ = one.items()
    mark = ", best" if one["best"] else ", stopped early" if one["stopped"] else ""
    text = f"{option.replace('_', ' ')} {value}: {metric} {one[metric]:.4f}"
    return f"{text} after {one['steps']} steps{mark}"


def _verdict(
    candidates: Sequence[Candidate], chosen: Candidate, metric: str, measure: Measured | None
) -> str:
    steps = sum(candidate.steps for candidate in candidates)
    text = f"best by {metric}: {chosen.pruning.chooses.replace('_', ' ')} {chosen.name}"
    if not chosen.pruning.prunes:
        text += ", so pruning does not help here"
    text += f"; {steps} training steps in all"
    return text + (f", {measure.generated} outputs generated to choose" if measure else "")
