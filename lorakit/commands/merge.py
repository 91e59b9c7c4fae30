"""`lorakit merge`: several adapters and a few target examples to one adapter."""

from __future__ import annotations

from typing import Any

import click

from lorakit import options
from lorakit.settings import PruningSettings, TrainingSettings

METHODS = ("adaptive",)


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--data", metavar="FILE", help="Target records (JSONL); `-` is stdin.")
@options.val
@click.option("--method", type=click.Choice(METHODS), help="[default: adaptive with --data]")
@options.pruning
@options.model
@options.training
@options.output("merged.safetensors", "the merged adapter")
@options.run
def merge(
    adapters: tuple[str, ...],
    data: str | None,
    val: str | None,
    method: str | None,
    output: str,
    **given: Any,
) -> None:
    """Merge adapters into one by training them jointly on a few target examples.

    After every step the least important parameters of each adapter, at each projection, are set to
    zero (--prune-ratio) and may grow again. The epoch with the lowest validation loss is kept.
    Adapters may differ in rank, alpha, target modules and layers.

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

    settings = options.settings_of(TrainingSettings, given)
    pruning = options.settings_of(PruningSettings, given)
    with watching(given, output) as watcher:
        loaded = [load_adapter(source) for source in adapters]
        base = open_base(
            given, loaded, settings.device, settings.dtype, watcher.note, training=True
        )
        adaptive.merge_adaptively(
            loaded,
            base,
            data,
            val,
            settings=settings,
            pruning=pruning,
            output=output,
            watcher=watcher,
            resume=given["resume"],
        )
