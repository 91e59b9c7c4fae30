"""`lorakit train-adapter`: records to a new adapter."""

from __future__ import annotations

import click

from lorakit.commands import _dry_run, _options, _training_options
from lorakit.commands._text_types import Layers, Names
from lorakit.commands._trackers import check_tracker
from lorakit.commands._types import RANK, Whole
from lorakit.reach import check_model
from lorakit.settings import (
    DryRunSettings,
    LoraSettings,
    ModelSettings,
    RunSettings,
    SelectionSettings,
    TrainingSettings,
)


@click.command("train-adapter")
@_options.data
@_training_options.val
@_options.model
@click.option("--rank", type=Whole(1, most=RANK), default=LoraSettings.rank, show_default=True)
@click.option(
    "--alpha", type=_training_options.POSITIVE, default=LoraSettings.alpha, show_default=True
)
@click.option(
    "--target-modules",
    type=Names(),
    metavar="NAMES",
    help="Projections to adapt, or all-linear. [default: query and value]",
)
@click.option(
    "--layers", type=Layers(), metavar="LAYERS", help="Layers to adapt: 0-19. [default: all]"
)
@_training_options.training
@_training_options.selection
@_options.output("adapter.safetensors", "the adapter")
@_training_options.run
@_dry_run.options
@_options.settings(
    model=ModelSettings,
    lora=LoraSettings,
    training=TrainingSettings,
    selection=SelectionSettings,
    run=RunSettings,
    dry_run=DryRunSettings,
)
def train_adapter(
    data: str,
    val: str | None,
    output: str,
    model: ModelSettings,
    lora: LoraSettings,
    training: TrainingSettings,
    selection: SelectionSettings,
    run: RunSettings,
    dry_run: DryRunSettings,
) -> None:
    """Train a LoRA adapter on records; the best epoch on the validation set is kept.

    \b
    lorakit train-adapter --data train.jsonl --val val.jsonl -o xs.safetensors
    """
    _options.check_stdin(data, val)
    _training_options.check_keep(training.keep)
    _dry_run.check_options(dry_run)
    _training_options.check_shard(model)
    check_tracker(run.track)
    check_model(model.model, model.revision)
    if dry_run.dry_run:
        _plan(data, val, model, lora, training, selection, run, dry_run)
        return
    from lorakit.commands._opening import open_base, reporting
    from lorakit.training import train

    with reporting(run, output) as reporter:
        base = open_base(model, (), training.device, training.dtype, reporter.note, training=True)
        train.train_adapter(
            base,
            data,
            val,
            settings=training,
            lora=lora,
            output=output,
            reporter=reporter,
            resume=run.resume,
            checkpoint_every=run.checkpoint_every,
            selection=selection,
        )


def _plan(
    data: str,
    val: str | None,
    model: ModelSettings,
    lora: LoraSettings,
    training: TrainingSettings,
    selection: SelectionSettings,
    run: RunSettings,
    dry_run: DryRunSettings,
) -> None:
    """Say what the run would do."""
    from lorakit.commands._progress import TerminalReporter
    from lorakit.training.plan import plan_adapter

    reporter = TerminalReporter(quiet=run.quiet)
    skeleton, load = _dry_run.open_bases(dry_run, model, (), training, reporter.note)
    rows = plan_adapter(
        skeleton,
        data,
        val,
        settings=training,
        lora=lora,
        selection=selection,
        reporter=reporter,
        load=load,
    )
    _dry_run.show(rows, dry_run.layout)
