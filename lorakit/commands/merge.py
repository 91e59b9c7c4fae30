"""`lorakit merge`: several adapters to one, trained on a few target examples or without data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any  # click gives options' values untyped

import click

from lorakit.commands import _dry_run, _methods, _options, _training_options
from lorakit.commands._trackers import check_tracker
from lorakit.merging.methods import METHODS
from lorakit.reach import check_model
from lorakit.runs.processes import is_first_process
from lorakit.settings import (
    DryRunSettings,
    ModelSettings,
    PruningSettings,
    PruningValues,
    RunSettings,
    SelectionSettings,
    StaticSettings,
    TrainingSettings,
)

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter
    from lorakit.commands._progress import TerminalReporter


@click.command(epilog=_methods.EPILOG)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--data", metavar="FILE", help="Target records (JSONL); `-` is stdin.")
@_training_options.val
@_methods.method
@_methods.static
@_methods.approximate
@_methods.portable
@_methods.pruning
@_options.model
@_training_options.training
@_training_options.selection
@_methods.metric
@_options.plot("the score of every ratio or threshold tried, with 95 % intervals")
@_options.output("merged.safetensors", "the merged adapter")
@_training_options.run
@_dry_run.options
@_options.settings(
    static=StaticSettings,
    pruning=PruningSettings,
    model=ModelSettings,
    training=TrainingSettings,
    selection=SelectionSettings,
    run=RunSettings,
    dry_run=DryRunSettings,
)
def merge(
    adapters: tuple[str, ...],
    data: str | None,
    val: str | None,
    method: str | None,
    weights: tuple[Any, ...],
    weights_by_layer: str | None,
    prune_ratio: PruningValues | None,
    prune_threshold: PruningValues | None,
    approximate: str | None,
    portable: bool,
    plot: str | None,
    output: str,
    static: StaticSettings,
    pruning: PruningSettings,
    model: ModelSettings,
    training: TrainingSettings,
    selection: SelectionSettings,
    run: RunSettings,
    dry_run: DryRunSettings,
) -> None:
    """Merge adapters into one: trained jointly on a few target examples, or from the files alone.

    With --data (method adaptive), after every step the least important parameters of each adapter,
    at each projection, are set to zero (--prune-ratio) and may grow again; the best epoch on the
    validation set is kept, and of several ratios the best one. Methods lorahub and learned-weights
    find weights for the adapters on --data. The other methods need no data and no base model.
    Adapters may differ in rank, alpha, target modules and layers.

    \b
    lorakit merge xs.safetensors wl.safetensors --data train.jsonl --prune-ratio 0.1
    lorakit merge xs.safetensors wl.safetensors --method ties --density 0.2 --weights 1,0.5
    lorakit merge xs.safetensors wl.safetensors --data few.jsonl --method learned-weights
    lorakit merge xs.safetensors wl.safetensors --method linear --weights xs=0-3:1,4-:0.5
    lorakit merge xs.safetensors --rank 4
    """
    method = _methods.choose_method(method, data, static, adapters)
    _methods.check_options(method)
    _methods.check_rank(static)
    _options.check_stdin(*adapters, data, val, weights_by_layer)
    static = _methods.with_weights(static, weights, weights_by_layer, adapters)
    _training_options.check_keep(training.keep)
    _dry_run.check_options(dry_run)
    _training_options.check_shard(model)
    if method in METHODS:
        _merge_statically(
            adapters,
            method,
            static,
            output=output,
            portable=portable,
            quiet=run.quiet,
            base=model if approximate else None,
        )
        return
    pruning, values = _methods.with_values(pruning, prune_ratio, prune_threshold)
    _methods.check_search(values, plot=plot, metric=selection.metric)
    from lorakit.commands._plots import check_plot, plot_search

    if plot:
        check_plot(plot)
    check_tracker(run.track)
    check_model(model.model, model.revision)
    if dry_run.dry_run:
        _plan(
            adapters,
            str(data),
            val,
            method,
            model,
            _methods.with_own_learning_rate(method, training),
            selection,
            pruning,
            values,
            run,
            dry_run,
            approximate,
        )
        return
    from lorakit.commands._opening import open_base_and_adapters, reporting
    from lorakit.merging.adaptive import merge_adaptively
    from lorakit.merging.learned_weights import merge_with_learned_weights
    from lorakit.merging.lorahub import merge_lorahub

    with reporting(run, output, portable=portable) as reporter:
        loaded = _load(adapters, model if approximate else None, None, reporter, plain=False)
        base, loaded = open_base_and_adapters(
            model, loaded, training.device, training.dtype, reporter.note, training=True
        )
        if method == "lorahub":
            merge_lorahub(
                loaded,
                base,
                str(data),
                settings=training,
                output=output,
                reporter=reporter,
                resume=run.resume,
                portable=portable,
            )
            return
        if method == "learned-weights":
            merge_with_learned_weights(
                loaded,
                base,
                str(data),
                val,
                settings=_methods.with_own_learning_rate(method, training),
                selection=selection,
                output=output,
                reporter=reporter,
                resume=run.resume,
                checkpoint_every=run.checkpoint_every,
                portable=portable,
            )
            return
        rows = merge_adaptively(
            loaded,
            base,
            str(data),
            val,
            settings=training,
            pruning=pruning,
            values=values,
            selection=selection,
            output=output,
            reporter=reporter,
            resume=run.resume,
            checkpoint_every=run.checkpoint_every,
            portable=portable,
            intervals=bool(plot),
        )
        if plot and is_first_process():
            plot_search(rows, metric=selection.search_metric, output=plot)


def _plan(
    adapters: tuple[str, ...],
    data: str,
    val: str | None,
    method: str,
    model: ModelSettings,
    training: TrainingSettings,
    selection: SelectionSettings,
    pruning: PruningSettings,
    values: PruningValues,
    run: RunSettings,
    dry_run: DryRunSettings,
    approximate: str | None,
) -> None:
    """Say what a merge that trains would do."""
    from lorakit.commands._progress import TerminalReporter
    from lorakit.merging.plan import plan_lorahub, plan_merge

    reporter = TerminalReporter(quiet=run.quiet)
    loaded = _load(adapters, model if approximate else None, None, reporter)
    skeleton, load = _dry_run.open_bases(dry_run, model, loaded, training, reporter.note)
    if method == "lorahub":
        rows = plan_lorahub(skeleton, loaded, data, settings=training, reporter=reporter, load=load)
    else:
        rows = plan_merge(
            skeleton,
            loaded,
            data,
            val,
            settings=training,
            selection=selection,
            reporter=reporter,
            pruning=pruning if method == "adaptive" else None,
            values=values,
            load=load,
        )
    _dry_run.show(rows, dry_run.layout)


def _merge_statically(
    adapters: tuple[str, ...],
    method: str,
    settings: StaticSettings,
    *,
    output: str,
    portable: bool,
    quiet: bool,
    base: ModelSettings | None,
) -> None:
    """Merge without data: but for DoRA's, no base model is read, and torch is not imported."""
    from lorakit.adapters.serving import serving_note
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import check_adapter_output
    from lorakit.merging.static import merge_statically

    if not is_first_process():
        return
    reporter = TerminalReporter(quiet=quiet)
    check_adapter_output(output)
    merge_statically(
        _load(adapters, base, settings.rank, reporter, plain=False),
        method,
        settings=settings,
        output=output,
        reporter=reporter,
        portable=portable,
    )
    reporter.note(f"wrote {output}")
    if portable and (line := serving_note(output)):
        reporter.note(line)


def _load(
    sources: tuple[str, ...],
    base: ModelSettings | None,
    rank: int | None,
    reporter: TerminalReporter,
    *,
    plain: bool = True,
) -> list[Adapter]:
    """Return the adapters; with a base, those of DoRA as the nearest LoRA of a rank or their own.

    With `plain`, none may hold more than A and B.
    """
    from lorakit.adapters.storage import load_adapter

    if base is None:
        return [load_adapter(source, plain=plain) for source in sources]
    from lorakit.commands._opening import open_folder
    from lorakit.merging.approximate import approximate_dora

    loaded = [load_adapter(source, plain=False) for source in sources]
    folder = open_folder(base, loaded, reporter.note)
    return approximate_dora(loaded, folder, rank=rank, reporter=reporter)
