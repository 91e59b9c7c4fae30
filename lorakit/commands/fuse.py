"""`lorakit fuse`: an adapter and its base to one model folder."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.commands import _options
from lorakit.reach import check_model
from lorakit.settings import ModelSettings


@click.command()
@click.argument("adapter", required=False)
@_options.base_model
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Number format of the weights. [default: as the base has each]",
)
@click.option("-o", "--output", required=True, metavar="FOLDER", help="The new model's folder.")
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Compare the logits of a prompt with those of base and adapter, which loads both models.",
)
@_options.device
@_options.resume
@_options.quiet
@_options.settings(model=ModelSettings)
def fuse(
    adapter: str | None,
    dtype: str | None,
    output: str,
    check: bool,
    device: str,
    resume: bool,
    quiet: bool,
    model: ModelSettings,
) -> None:
    """Fuse an adapter into its base: W0 + ΔW in float32, rounded once to the base's format.

    ADAPTER is a file, a PEFT folder, `-` (the default: a pipe) or hf://owner/name[@revision].
    FOLDER gets the weights in the base's shards, its config, tokenizer, template and generation
    config, and a model card, and loads as any model. DoRA is applied exactly, and weights that the
    adapter holds whole (modules_to_save) replace the base's. One tensor is in memory at a time, but
    for the check at the end. A base quantised by bitsandbytes, to fp8 or mxfp4 becomes plain
    numbers first; another one is refused: name the one it was made from by --model.

    \b
    lorakit fuse merged.safetensors -o model/
    lorakit find-boundary merged.safetensors --data val.jsonl |
        lorakit strip-layers merged.safetensors --boundary - -o - | lorakit fuse -o model/
    """
    source = _options.adapter_source(adapter)
    check_model(model.model, model.revision)
    from lorakit.adapters.storage import load_adapter
    from lorakit.commands._opening import open_folder
    from lorakit.commands._progress import TerminalReporter
    from lorakit.export.check import check_fused
    from lorakit.export.fuse import fuse as fuse_into
    from lorakit.models.devices import DTYPES, pick_device

    reporter = TerminalReporter(quiet=quiet)
    loaded = load_adapter(source, plain=False)
    base = open_folder(model, [loaded], reporter.note)
    model = ModelSettings(base.name, base.revision, model.trust_remote_code)

    def compare(folder: Path, stored: str) -> None:
        check_fused(
            folder,
            loaded,
            model,
            base.name,
            device=pick_device(device),
            stored=DTYPES[stored],
            note=reporter.note,
        )

    fuse_into(
        loaded,
        base,
        output,
        dtype=dtype,
        resume=resume,
        reporter=reporter,
        check=compare if check else None,
    )
    reporter.note(f"wrote {output}")
