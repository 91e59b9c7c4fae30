"""`lorakit convert`: an adapter from one kind of file to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter


def _save_peft(adapter: Adapter, output: str) -> None:
    from lorakit.adapters.storage import save_adapter

    save_adapter(adapter, output)


def _save_mlx(adapter: Adapter, output: str) -> None:
    from lorakit.adapters.mlx import save_mlx

    save_mlx(adapter, output)


def _save_vllm(adapter: Adapter, output: str) -> None:
    from lorakit.adapters.portable import make_portable
    from lorakit.adapters.serving import vllm_command
    from lorakit.adapters.storage import save_adapter

    vllm_command(adapter, output)  # raises an error for a rank beyond vLLM's
    save_adapter(make_portable(adapter), output)


# How an adapter is written, by the program that is to read it.
FORMS: dict[str, Callable[[Adapter, str], None]] = {
    "peft": _save_peft,
    "mlx": _save_mlx,
    "vllm": _save_vllm,
}
_FOLDERS = {"mlx": "MLX", "vllm": "vLLM"}  # what reads folders alone


@click.command()
@click.argument("adapter")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="x.safetensors is a single file, folder/ a PEFT folder with a model card, `-` stdout.",
)
@click.option(
    "--to",
    "form",
    type=click.Choice(list(FORMS)),
    default="peft",
    show_default=True,
    help="The program that OUT is for; mlx and vllm are folders, the latter as merge --portable.",
)
@click.option(
    "--initial-adapter",
    metavar="FOLDER",
    help="ADAPTER as it was before training, where its initialisation (PiSSA, OLoRA, CorDA, "
    "LoRA-GA) changed the base: what is written is LoRA on the unchanged base, at twice the rank.",
)
@_options.quiet
def convert(adapter: str, output: str, form: str, initial_adapter: str | None, quiet: bool) -> None:
    """Write an adapter as a single file or as a folder, of PEFT's or of MLX's.

    ADAPTER is a file, a PEFT folder, `-` or hf://owner/name[@revision], of which tensors and header
    stay as they are; an MLX folder, or its tensor file, whose tensors are transposed; or PEFT's old
    adapter_model.bin, beside its adapter_config.json, which becomes safetensors. Nothing in the
    pickle is run. An adapter of PiSSA's or its kin is converted by --initial-adapter.

    \b
    lorakit convert merged.safetensors -o merged/
    lorakit convert hf://owner/name -o name.safetensors
    lorakit convert old/adapter_model.bin -o old/
    lorakit convert merged.safetensors --to mlx -o mlx/
    lorakit convert mlx/ -o peft/
    lorakit convert merged.safetensors --to vllm -o served/
    lorakit convert pissa/ --initial-adapter pissa-init/ -o lora/
    """
    from lorakit.adapters.serving import serving_note
    from lorakit.adapters.whole import check_plain
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import check_adapter_output

    _options.check_stdin(adapter, initial_adapter)
    _check_form(form, output)
    check_adapter_output(output)
    loaded = _load(adapter) if initial_adapter is None else _undone(adapter, initial_adapter)
    if form != "peft":
        check_plain(loaded, form)
    FORMS[form](loaded, output)
    reporter = TerminalReporter(quiet=quiet)
    reporter.note(f"wrote {output}")
    if form == "vllm" and (line := serving_note(output)):
        reporter.note(line)


def _check_form(form: str, output: str) -> None:
    """Raise LorakitError for an output whose name is not one of the form's."""
    from lorakit.errors import LorakitError
    from lorakit.files import is_stream, names_folder

    if form in _FOLDERS and (is_stream(output) or not names_folder(output)):
        raise LorakitError(f"{_FOLDERS[form]} reads folders, and {output} is none; end -o in /")
    if not (is_stream(output) or names_folder(output) or output.endswith(".safetensors")):
        raise LorakitError(
            f"convert writes no {Path(output).suffix} files; end -o in .safetensors or, for a "
            "folder, in /"
        )


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
