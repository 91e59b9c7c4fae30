"""`lorakit fuse`: an adapter and its base to one model, in a folder or as a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.reach import check_model
from lorakit.settings import ModelSettings

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter
    from lorakit.export.model_folder import ModelFolder
    from lorakit.reporting import Reporter

_SHORT = {"bf16": "bfloat16", "f16": "float16"}  # llama.cpp's names


@click.command()
@click.argument("adapter", required=False)
@_options.base_model
@click.option(
    "--to",
    "form",
    type=click.Choice(["folder", "gguf"]),
    default="folder",
    show_default=True,
    help="What OUT is: a folder for transformers, vLLM and MLX, or llama.cpp's file.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", *_SHORT, "q8_0"]),
    help="Number format of the weights; q8_0 in GGUF alone. [default: as the base has each]",
)
@click.option("-o", "--output", required=True, metavar="OUT", help="The new folder, or x.gguf.")
@click.option("--base-only", is_flag=True, help="Write the base alone, as GGUF.")
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
    form: str,
    dtype: str | None,
    output: str,
    base_only: bool,
    check: bool,
    device: str,
    resume: bool,
    quiet: bool,
    model: ModelSettings,
) -> None:
    """Fuse an adapter into its base: W0 + ΔW in float32, rounded once to the base's format.

    ADAPTER is a file, a PEFT folder, `-` (the default: a pipe) or hf://owner/name[@revision].
    A folder gets the weights in the base's shards, its config, tokenizer, template and generation
    config, and a model card, and loads as any model. DoRA is applied exactly, and weights that the
    adapter holds whole (modules_to_save) replace the base's. One tensor is in memory at a time, but
    for the check at the end. A base quantised by bitsandbytes, to fp8 or mxfp4 becomes plain
    numbers first; another one is refused: name the one it was made from by --model. --to gguf
    writes one file with weights, shape, tokenizer and template, as llama.cpp has them; what it
    would compute otherwise is refused. A note says how the file is served.

    \b
    lorakit fuse merged.safetensors -o model/
    lorakit fuse merged.safetensors --to gguf --dtype q8_0 -o model.gguf
    lorakit fuse --base-only --model tiny --to gguf -o base.gguf
    lorakit find-boundary merged.safetensors --data val.jsonl |
        lorakit strip-layers merged.safetensors --boundary - -o - | lorakit fuse -o model/
    """
    _check_form(form, dtype, output, adapter, base_only=base_only)
    dtype = _SHORT.get(dtype or "", dtype)
    source = None if base_only else _options.adapter_source(adapter)
    check_model(model.model, model.revision)
    from lorakit.adapters.storage import load_adapter
    from lorakit.commands._opening import open_folder
    from lorakit.commands._progress import TerminalReporter
    from lorakit.export.fuse import fuse as fuse_into

    reporter = TerminalReporter(quiet=quiet)
    adapters = [] if source is None else [load_adapter(source, plain=False)]
    base = open_folder(model, adapters, reporter.note)
    model = ModelSettings(base.name, base.revision, model.trust_remote_code)
    if form == "gguf":
        from lorakit.gguf.model import fuse_gguf

        fuse_gguf(
            adapters[0] if adapters else None,
            base,
            output,
            dtype=dtype,
            trust_remote_code=model.trust_remote_code,
            reporter=reporter,
        )
    else:
        fuse_into(
            adapters[0],
            base,
            output,
            dtype=dtype,
            resume=resume,
            reporter=reporter,
            check=_comparison(adapters[0], base, model, device, reporter) if check else None,
        )
    reporter.note(f"wrote {output}")
    if form == "gguf":
        from lorakit.gguf.serving import model_lines

        for line in model_lines(output):
            reporter.note(line)


def _comparison(
    adapter: Adapter,
    base: ModelFolder,
    model: ModelSettings,
    device: str,
    reporter: Reporter,
) -> Callable[[Path, str], None]:
    """Return the check of a fused folder, whose tensors have a format, against base and adapter."""
    from lorakit.export.check import check_fused
    from lorakit.models.devices import DTYPES, pick_device

    def compare(folder: Path, stored: str) -> None:
        check_fused(
            folder,
            adapter,
            model,
            base.name,
            device=pick_device(device),
            stored=DTYPES[stored],
            note=reporter.note,
        )

    return compare


def _check_form(
    form: str, dtype: str | None, output: str, adapter: str | None, *, base_only: bool
) -> None:
    """Raise an error for options and names that the form does not go with."""
    options = _options.options_on_command_line().values()
    if base_only and adapter is not None:
        raise click.UsageError("--base-only takes no ADAPTER.")
    if form == "gguf":
        for option in ("--check", "--no-check", "--resume", "--device"):
            if option in options:
                raise click.UsageError(f"{option} is read by --to folder alone.")
        from lorakit.gguf.file import check_gguf_output

        check_gguf_output(output)
    elif dtype == "q8_0" or base_only:
        raise click.UsageError(f"{'--base-only' if base_only else 'q8_0'} needs --to gguf.")
