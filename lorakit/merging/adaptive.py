"""Adaptive LoRA merge: train adapters jointly on the target data, and prune them at every step.

This is `merge --data`, from the loaded adapters to the written one. The stack that is trained is in
joint.py, pruning in criteria.py and pruner.py, the training loop in training/trainer.py, and the
search among several pruning settings in pruning_search.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.adapters.adapter import Adapter
from lorakit.merging.joint import prepare
from lorakit.merging.pruner import shares_reset
from lorakit.merging.pruning_search import Values, search_and_write
from lorakit.models.base import Base
from lorakit.reporting import Reporter
from lorakit.settings import PruningSettings, SelectionSettings, TrainingSettings
from lorakit.training.checkpoint import checkpoint_of
from lorakit.training.train import train_and_save, trained_factors


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
    checkpoint_every: int | None = None,
    values: Values = (),
    selection: SelectionSettings | None = None,
    portable: bool = False,
    intervals: bool = False,
) -> list[dict[str, object]]:
    """Train the adapters jointly on the target data and write them to `output` as one adapter.

    Several `values`, which are ratios (thresholds, with unit `module`), are all tried, and the best
    on the validation set is written; `auto` is a ladder search. Returns an entry for each value
    tried; with `intervals`, the 95 % interval of its value over the validation records is in it.
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
        reporter=reporter,
    )
    if values == "auto" or len(values) > 1:
        return search_and_write(
            merge,
            pruning,
            values,
            output=output,
            reporter=reporter,
            resume=resume,
            checkpoint_every=checkpoint_every,
            intervals=intervals,
        )
    pruning = pruning.at(values[0]) if values else pruning
    entry = merge.entry(pruning)
    reporter.describe(entry)
    trainer = merge.trainer(pruning)
    train_and_save(
        trainer,
        merge.corpus,
        reporter,
        checkpoint=checkpoint_of(output, entry, base.record),
        resume=resume,
        checkpoint_every=checkpoint_every,
        export=lambda best: merge.export(trained_factors(best), entry, shares_reset(trainer)),
        output=output,
    )
    return []
