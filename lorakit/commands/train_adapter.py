"""`lorakit train-adapter`: records to a new adapter."""

from __future__ import annotations

from typing import Any

import click

from lorakit.commands import _options as options
from lorakit.settings import LoraSettings, SelectionSettings, TrainingSettings


@click.command("train-adapter")
@options.data
@options.val
@options.model
@options.lora
@options.training
@options.selection
@options.output("adapter.safetensors", "the adapter")
@options.run
def train_adapter(data: str, val: str | None, output: str, **given: Any) -> None:
    """Train a LoRA adapter on records; the best epoch on the validation set is kept.

    \b
    lorakit train-adapter --data train.jsonl --val val.jsonl -o xs.safetensors
    """
    options.one_pipe(data, val)
    from lorakit.commands._opening import open_base, watching
    from lorakit.training import train as fitting

    settings = options.settings_of(TrainingSettings, given)
    selection = options.settings_of(SelectionSettings, given)
    lora = options.settings_of(LoraSettings, given)
    with watching(given, output) as watcher:
        base = open_base(given, (), settings.device, settings.dtype, watcher.note, training=True)
        fitting.train_adapter(
            base,
            data,
            val,
            settings=settings,
            lora=lora,
            output=output,
            reporter=watcher,
            resume=given["resume"],
            selection=selection,
        )
