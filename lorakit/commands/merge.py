"""`lorakit merge`: several adapters and a few target examples to one adapter."""

from __future__ import annotations

from typing import Any

import click

from lorakit import options
from lorakit.settings import PruningSettings, SelectionSettings, TrainingSettings

METHODS = ("adaptive",)


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--data", metavar="FILE", help="Target records (JSONL); `-` is stdin.")
@options.val
@click.option("--method", type=click.Choice(METHODS), help="[default: adaptive with --data]")
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
    """Merge adapters into one by training them jointly on a few target examples.

    After every step the least important parameters of each adapter, at each projection, are set to
    zero (--prune-ratio) and may grow again. The best epoch on the validation set is kept, and of
    several ratios the best one. Adapters may differ in rank, alpha, target modules and layers.

    \b
    lorakit merge xs.safetensors wl.safetensors --data train.jsonl --prune-ratio 0.1
    """
    if data is None:
        raise click.UsageError(
            f"Missing option '--data'. Methods: {', '.join(METHODS)} (trains on --data)."
        )
    options.one_pipe(*adapters, data, val)
    from lorakit import adaptive
    from lorakit.adapter import load_adapter
    from lorakit.commands.opening import open_base, watching

    values = _amounts(given)
    if plot:
        from lorakit.plots import check_plot

        check_plot(plot)
        if values != "auto" and len(values) < 2:
            raise click.UsageError(
                "--plot shows several ratios or thresholds: give a list or auto."
            )
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
            watcher=watcher,
            resume=given["resume"],
            values=values,
            selection=selection,
        )
        if plot:
            from lorakit.plots import plot_search

            plot_search(tried, metric=selection.searches_by, output=plot)


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
