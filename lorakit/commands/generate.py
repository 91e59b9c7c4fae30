"""`lorakit generate`: records to records with predictions."""

from __future__ import annotations

from typing import Any

import click

from lorakit.commands import _options as options
from lorakit.files import STDIO
from lorakit.settings import GenerationSettings


@click.command()
@click.argument("adapter", required=False)
@options.data
@options.model
@options.generation
@options.output(STDIO, "the records")
@click.option("--resume", is_flag=True, help="Go on where a killed run stopped; needs -o.")
@options.quiet
def generate(adapter: str | None, data: str, output: str, **given: Any) -> None:
    """Write a completion for every record, greedily by default, as its field `prediction`.

    Records come out in the order they went in. Without ADAPTER the base model answers (zero-shot).

    \b
    lorakit generate merged.safetensors --data test.jsonl | lorakit score -
    """
    options.one_pipe(adapter, data)
    if given["resume"] and output == STDIO:
        raise click.UsageError("--resume needs -o FILE: a pipe keeps nothing to go on from.")
    from lorakit.adapters.storage import load_adapter
    from lorakit.commands._opening import open_base
    from lorakit.commands._progress import Notes
    from lorakit.models.predictions import write_predictions

    settings = options.settings_of(GenerationSettings, given)
    notes = Notes(quiet=given["quiet"])
    loaded = load_adapter(adapter) if adapter else None
    if loaded is None:
        notes.note("no ADAPTER: the base model answers zero-shot")
    known = [loaded] if loaded else []
    base = open_base(given, known, settings.device, settings.dtype, notes.note, training=False)
    write_predictions(
        base, loaded, data, settings=settings, output=output, resume=given["resume"], notes=notes
    )
