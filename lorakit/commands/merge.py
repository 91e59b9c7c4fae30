"""`lorakit merge`: several adapters to one, trained on a few target examples or without data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import click

from lorakit.commands import _options as options
from lorakit.commands._methods import EPILOG, HELP, check_options, check_weights, choose_method
from lorakit.merging.methods import METHODS
from lorakit.settings import (
    PruningSettings,
    SelectionSettings,
    StaticSettings,
    TrainingSettings,
)

if TYPE_CHECKING:
    from lorakit.reporting import Reporter


@click.command(epilog=EPILOG)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--data", metavar="FILE", help="Target records (JSONL); `-` is stdin.")
@options.val
@click.option(
    "--method",
    type=click.Choice(list(HELP)),
    help="How to merge, see below. [default: adaptive with --data; svd for one adapter and --rank]",
)
@options.static
@options.portable
@options.pruning
@options.model
@options.training
@options.selection
@options.metric
@options.plot("the score of every ratio or threshold tried")
@options.output("merged.safetensors", "the merged adapter")
@options.run
def merge(
    adapters: tuple[str, ...],
    data: str | None,
    val: str | None,
    method: str | None,
    output: str,
    plot: str | None,
    **given: Any,
) -> None:
    """Merge adapters into one: trained jointly on a few target examples, or from the files alone.

    With --data (method adaptive), after every step the least important parameters of each adapter,
    at each projection, are set to zero (--prune-ratio) and may grow again; the best epoch on the
    validation set is kept, and of several ratios the best one. Method lorahub finds weights on
    --data. The other methods need no data and no base model. Adapters may differ in rank, alpha,
    target modules and layers.

    \b
    lorakit merge xs.safetensors wl.safetensors --data train.jsonl --prune-ratio 0.1
    lorakit merge xs.safetensors wl.safetensors --method ties --density 0.2 --weights 1,0.5
    lorakit merge xs.safetensors wl.safetensors --data few.jsonl --method lorahub
    lorakit merge xs.safetensors --rank 4
    """
    method = choose_method(method, data, given["rank"], adapters)
    check_options(method)
    check_weights(given["weights"], adapters)
    options.one_pipe(*adapters, data, val)
    if method in METHODS:
        _merge_statically(adapters, method, output, given)
    elif method == "lorahub":
        _merge_lorahub(adapters, str(data), output, given)
    else:
        _merge_adaptively(adapters, str(data), val, output, plot, given)


def _merge_adaptively(
    adapters: tuple[str, ...],
    data: str,
    val: str | None,
    output: str,
    plot: str | None,
    given: dict[str, Any],
) -> None:
    values = _amounts(given)
    several = values == "auto" or len(values) > 1
    for name, value in (("--plot", plot), ("--metric", given["metric"])):
        if value and not several:
            raise click.UsageError(f"{name} needs several ratios or thresholds, or auto.")
    from lorakit.adapters.storage import load_adapter
    from lorakit.commands._opening import open_base, watching
    from lorakit.commands._plots import check_plot, plot_search
    from lorakit.merging import adaptive

    if plot:
        check_plot(plot)
    settings = options.settings_of(TrainingSettings, given)
    pruning = options.settings_of(PruningSettings, given)
    selection = options.settings_of(SelectionSettings, given)
    with watching(given, output) as watcher:
        loaded = [load_adapter(source) for source in adapters]
        base = open_base(
            given, loaded, settings.device, settings.dtype, watcher.note, training=True
        )
        tried = adaptive.merge_adaptively(
            loaded,
            base,
            data,
            val,
            settings=settings,
            pruning=pruning,
            output=output,
            reporter=watcher,
            resume=given["resume"],
            values=values,
            selection=selection,
            portable=given["portable"],
        )
        if plot:
            plot_search(tried, metric=selection.searches_by, output=plot)


def _merge_lorahub(
    adapters: tuple[str, ...], data: str, output: str, given: dict[str, Any]
) -> None:
    from lorakit.adapters.storage import load_adapter
    from lorakit.commands._opening import open_base, watching
    from lorakit.merging import lorahub

    settings = options.settings_of(TrainingSettings, given)
    with watching(given, output) as watcher:
        loaded = [load_adapter(source) for source in adapters]
        base = open_base(
            given, loaded, settings.device, settings.dtype, watcher.note, training=True
        )
        lorahub.merge_lorahub(
            loaded,
            base,
            data,
            settings=settings,
            output=output,
            reporter=watcher,
            portable=given["portable"],
        )


def _amounts(given: dict[str, Any]) -> Any:
    """Take the ratios or thresholds, whichever the unit asks for, out of the arguments."""
    ratio, threshold = given.pop("prune_ratio"), given.pop("prune_threshold")
    if given["unit"] == "module":
        if ratio is not None:
            raise click.UsageError("--unit module is told by --prune-threshold, not --prune-ratio.")
        if threshold is None:
            raise click.UsageError("Missing option '--prune-threshold', which --unit module needs.")
        return threshold
    if threshold is not None:
        raise click.UsageError("--prune-threshold is for --unit module only.")
    return () if ratio is None else ratio


def _merge_statically(
    adapters: tuple[str, ...], method: str, output: str, given: dict[str, Any]
) -> None:
    from lorakit.adapters.storage import load_adapter
    from lorakit.commands._progress import Notes
    from lorakit.files import check_adapter_output
    from lorakit.merging import static as static_merge

    notes = Notes(quiet=given["quiet"])
    check_adapter_output(output)
    static_merge.merge_statically(
        [load_adapter(source) for source in adapters],
        method,
        settings=options.settings_of(StaticSettings, given),
        output=output,
        reporter=cast("Reporter", notes),
        portable=given["portable"],
    )
    notes.note(f"wrote {output}")
