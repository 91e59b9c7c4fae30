"""`lorakit convert`: an adapter from one kind of file to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter


@click.command()
@click.argument("adapter")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="x.safetensors is a single file, folder/ a PEFT folder with a model card, `-` stdout.",
)
@_options.quiet
def convert(adapter: str, output: str, quiet: bool) -> None:
    """Write an adapter as a single file or as a PEFT folder; tensors and header stay as they are.

    ADAPTER is a file, a PEFT folder, `-` or hf://owner/name[@revision]; or PEFT's old
    adapter_model.bin, beside its adapter_config.json, which becomes safetensors. Nothing in the
    pickle is run.

    \b
    lorakit convert merged.safetensors -o merged/
    lorakit convert hf://owner/name -o name.safetensors
    lorakit convert old/adapter_model.bin -o old/
    """
    from lorakit.adapters.storage import save_adapter
    from lorakit.commands._progress import TerminalReporter
    from lorakit.errors import LorakitError
    from lorakit.files import check_adapter_output, is_stream, names_folder

    if not (is_stream(output) or names_folder(output) or output.endswith(".safetensors")):
        raise LorakitError(
            f"convert writes no {Path(output).suffix} files; end -o in .safetensors or, for a "
            "folder, in /"
        )
    check_adapter_output(output)
    save_adapter(_load(adapter), output)
    TerminalReporter(quiet=quiet).note(f"wrote {output}")


def _load(source: str) -> Adapter:
    """Return the adapter in any file that lorakit reads, or in a pickle."""
    from lorakit.adapters.foreign import find_pickle
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
