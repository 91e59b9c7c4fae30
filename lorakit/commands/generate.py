"""`lorakit generate`: records to records with predictions."""

from __future__ import annotations

import click

from lorakit.commands import _options
from lorakit.files import STDIO
from lorakit.settings import GenerationSettings, ModelSettings


@click.command()
@click.argument("adapter", required=False)
@_options.data
@_options.model
@_options.decoding
@_options.field_option(
    GenerationSettings,
    "temperature",
    click.FloatRange(min=0),
    "Sample at this temperature; 0 is greedy decoding.",
)
@_options.field_option(
    GenerationSettings,
    "top_p",
    click.FloatRange(min=0, min_open=True, max=1),
    "Sample from the most probable tokens that make up this share.",
)
@_options.max_length
@_options.truncate
@_options.seed
@_options.output(STDIO, "the records")
@_options.resume
@_options.quiet
@_options.settings(model=ModelSettings, generation=GenerationSettings)
def generate(
    adapter: str | None,
    data: str,
    output: str,
    resume: bool,
    quiet: bool,
    model: ModelSettings,
    generation: GenerationSettings,
) -> None:
    """Write a completion for every record, greedily by default, as its field `prediction`.

    Records come out in the order they went in. Without ADAPTER the base model answers (zero-shot).

    \b
    lorakit generate merged.safetensors --data test.jsonl | lorakit score -
    """
    _options.check_stdin(adapter, data)
    _options.check_resume(resume, output)
    from lorakit.adapters.storage import load_adapter
    from lorakit.commands._opening import open_base
    from lorakit.commands._progress import TerminalReporter
    from lorakit.models.predictions import write_predictions

    reporter = TerminalReporter(quiet=quiet)
    adapters = [load_adapter(adapter)] if adapter else []
    if not adapters:
        reporter.note("no ADAPTER: the base model answers zero-shot")
    base = open_base(
        model, adapters, generation.device, generation.dtype, reporter.note, training=False
    )
    write_predictions(
        base,
        adapters[0] if adapters else None,
        data,
        settings=generation,
        output=output,
        resume=resume,
        reporter=reporter,
    )
