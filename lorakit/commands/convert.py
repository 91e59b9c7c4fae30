"""`lorakit convert`: an adapter from one kind of file to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.commands._forms import FORMS
from lorakit.settings import ModelSettings

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter


@click.command()
@click.argument("adapter")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="A file, or a folder if it has no suffix, ends in / or is one; `-` is stdout.",
)
@click.option(
    "--to",
    "form",
    type=click.Choice(list(FORMS)),
    default="peft",
    show_default=True,
    help="The program that OUT is for: mlx and vllm are folders, gguf is llama.cpp's file.",
)
@click.option(
    "--initial-adapter",
    metavar="FOLDER",
    help="ADAPTER as it was before training, where its initialisation (PiSSA, OLoRA, CorDA, "
    "LoRA-GA) changed the base: what is written is LoRA on the unchanged base, at twice the rank.",
)
@_options.base_name
@_options.quiet
@_options.settings(model=ModelSettings)
def convert(
    adapter: str,
    output: str,
    form: str,
    initial_adapter: str | None,
    quiet: bool,
    model: ModelSettings,
) -> None:
    """Write an adapter as a single file or as a folder, of PEFT's, MLX's or vLLM's, or as GGUF.

    ADAPTER is a file, a PEFT folder, `-` or hf://owner/name[@revision], of which tensors and header
    stay as they are; an MLX folder, or its tensor file, whose tensors are transposed; or PEFT's old
    adapter_model.bin, beside its adapter_config.json, which becomes safetensors. Nothing in the
    pickle is run. An adapter of PiSSA's or its kin is converted by --initial-adapter. --to vllm
    writes what merge --portable does; --to gguf asks the base's config, which --model names, for
    the layout that llama.cpp has. A note says how the output is served.

    \b
    lorakit convert merged.safetensors -o merged/
    lorakit convert hf://owner/name -o adapter.safetensors
    lorakit convert old/adapter_model.bin -o old/
    lorakit convert merged.safetensors --to mlx -o mlx/
    lorakit convert mlx/ -o peft/
    lorakit convert merged.safetensors --to vllm -o served/
    lorakit convert merged.safetensors --to gguf -o merged.gguf
    lorakit convert pissa/ --initial-adapter pissa-init/ -o lora/
    """
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import check_adapter_output

    _options.check_stdin(adapter, initial_adapter)
    _check_base(form)
    FORMS[form].check_output(output)
    check_adapter_output(output)
    loaded = _load(adapter) if initial_adapter is None else _undone(adapter, initial_adapter)
    reporter = TerminalReporter(quiet=quiet)
    FORMS[form].save(loaded, output, model, reporter.note)
    reporter.note(f"wrote {output}")
    for line in FORMS[form].serving(output):
        reporter.note(line)


def _check_base(form: str) -> None:
    """Raise a usage error for a base that is named for a form that does not need it."""
    for option in _options.options_on_command_line().values():
        if form != "gguf" and option in ("--model", "--revision"):
            raise click.UsageError(f"{option} is read by --to gguf alone.")


def _load(source: str) -> Adapter:
    """Return the adapter in any file that lorakit reads, of MLX's, or in a pickle."""
    from lorakit.adapters.foreign import find_pickle
    from lorakit.adapters.mlx import find_mlx, load_mlx
    from lorakit.adapters.storage import HUB, load_adapter
    from lorakit.errors import LorakitError

    pickle: Path | None
    if source.startswith(HUB):
        try:
            return load_adapter(source, plain=False)
        except LorakitError:
            pickle = _fetch_pickle(source)
            if pickle is None:
                raise
    elif (mlx := find_mlx(source)) is not None:
        return load_mlx(mlx, source)
    else:
        pickle = find_pickle(source)
    if pickle is None:
        return load_adapter(source, plain=False)
    from lorakit.models.pickles import load_pickled_adapter

    return load_pickled_adapter(pickle, source)


def _undone(source: str, initial: str) -> Adapter:
    """Return an adapter that changed its base at first as one on the unchanged base."""
    from lorakit.adapters.initial import subtract_initial
    from lorakit.adapters.storage import load_adapter

    adapter, before = (load_adapter(each, plain=False, any_init=True) for each in (source, initial))
    return subtract_initial(adapter, before)


def _fetch_pickle(address: str) -> Path | None:
    """Return the pickle of an adapter on the hub; None where it has none."""
    from lorakit.adapters.foreign import PICKLE_FILE
    from lorakit.adapters.storage import CONFIG_FILE
    from lorakit.errors import LorakitError
    from lorakit.hub import fetch_adapter

    try:
        return fetch_adapter(address, CONFIG_FILE, PICKLE_FILE) / PICKLE_FILE
    except LorakitError:
        return None
