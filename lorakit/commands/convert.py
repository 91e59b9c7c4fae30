"""`lorakit convert`: an adapter from one kind of file to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.settings import ModelSettings

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter

    Note = Callable[[str], None]
    Save = Callable[[Adapter, str, ModelSettings, Note], None]


def _save_peft(adapter: Adapter, output: str, model: ModelSettings, note: Note) -> None:
    from lorakit.adapters.storage import save_adapter

    save_adapter(adapter, output)


def _save_mlx(adapter: Adapter, output: str, model: ModelSettings, note: Note) -> None:
    from lorakit.adapters.mlx import save_mlx

    save_mlx(adapter, output)


def _save_gguf(adapter: Adapter, output: str, model: ModelSettings, note: Note) -> None:
    from lorakit.export.gguf_adapter import convert_to_gguf

    convert_to_gguf(adapter, output, model, note)


# How an adapter is written, by the program that is to read it.
FORMS: dict[str, Save] = {"peft": _save_peft, "mlx": _save_mlx, "gguf": _save_gguf}


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
    help="The program that OUT is for; mlx is a folder, with MLX's config, gguf llama.cpp's file.",
)
@_options.base_name
@_options.quiet
@_options.settings(model=ModelSettings)
def convert(adapter: str, output: str, form: str, quiet: bool, model: ModelSettings) -> None:
    """Write an adapter as a single file or as a folder, of PEFT's or of MLX's, or for llama.cpp.

    ADAPTER is a file, a PEFT folder, `-` or hf://owner/name[@revision], of which tensors and header
    stay as they are; an MLX folder, or its tensor file, whose tensors are transposed; or PEFT's old
    adapter_model.bin, beside its adapter_config.json, which becomes safetensors. Nothing in the
    pickle is run. --to gguf asks the base's config, which --model names, for the layout that
    llama.cpp has; a note says how the file is served.

    \b
    lorakit convert merged.safetensors -o merged/
    lorakit convert hf://owner/name -o name.safetensors
    lorakit convert old/adapter_model.bin -o old/
    lorakit convert merged.safetensors --to mlx -o mlx/
    lorakit convert mlx/ -o peft/
    lorakit convert merged.safetensors --to gguf -o merged.gguf
    """
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import check_adapter_output

    _check_model(form)
    _check_form(form, output)
    check_adapter_output(output)
    reporter = TerminalReporter(quiet=quiet)
    FORMS[form](_load(adapter), output, model, reporter.note)
    reporter.note(f"wrote {output}")


def _check_model(form: str) -> None:
    """Raise a usage error for a base that is named for a form that does not need it."""
    for option in _options.options_on_command_line().values():
        if form != "gguf" and option in ("--model", "--revision"):
            raise click.UsageError(f"{option} is read by --to gguf alone.")


def _check_form(form: str, output: str) -> None:
    """Raise LorakitError for an output whose name is not one of the form's."""
    from lorakit.errors import LorakitError
    from lorakit.files import is_stream, names_folder

    if form == "gguf":
        from lorakit.export.gguf_file import check_gguf_output

        check_gguf_output(output)
        return
    if form == "mlx" and (is_stream(output) or not names_folder(output)):
        raise LorakitError(f"MLX reads folders, and {output} is none; end -o in /")
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
            return load_adapter(source)
        except LorakitError:
            pickle = _fetch_pickle(source)
            if pickle is None:
                raise
    elif (mlx := find_mlx(source)) is not None:
        return load_mlx(mlx, source)
    else:
        pickle = find_pickle(source)
    if pickle is None:
        return load_adapter(source)
    from lorakit.models.pickles import load_pickled_adapter

    return load_pickled_adapter(pickle, source)


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
