"""`lorakit strip-layers`: an adapter without the LoRA of its upper layers."""

from __future__ import annotations

import re
import sys

import click

from lorakit.commands import _options
from lorakit.commands._types import Layers
from lorakit.files import STDIO

_NUMBER = re.compile(r"[0-9]{1,9}")


@click.command("strip-layers")
@click.argument("adapter", required=False)
@click.option(
    "--boundary",
    metavar="K",
    help="Keep LoRA on the bottom K layers: a number, or find-boundary's records (a file or `-`).",
)
@click.option("--keep", type=Layers(), metavar="LAYERS", help="Keep LoRA on these layers: 0-9,12.")
@_options.output("stripped.safetensors", "the stripped adapter")
@_options.quiet
def strip_layers(
    adapter: str | None,
    boundary: str | None,
    keep: tuple[int, ...] | None,
    output: str,
    quiet: bool,
) -> None:
    """Take the LoRA off all layers from --boundary on, tensors and config together.

    ADAPTER is a file, a PEFT folder, `-` (the default: a pipe) or hf://owner/name[@revision]. What
    is kept stays byte for byte. Modules outside the layers, such as an output head, are kept.

    \b
    lorakit strip-layers merged.safetensors --boundary 15 -o final.safetensors
    """
    if (boundary is None) == (keep is None):
        raise click.UsageError("Give either --boundary or --keep.")
    if boundary is not None and re.fullmatch(r"-[0-9]+", boundary):
        raise click.BadParameter(f"{boundary} is below 0.", param_hint="'--boundary'")
    source = _source(adapter)
    _options.check_stdin(source, boundary)
    from lorakit.adapters.storage import load_adapter
    from lorakit.boundary.records import read_boundary
    from lorakit.boundary.strip import write_stripped
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import refuse_terminal

    if output == STDIO:
        refuse_terminal("an adapter")
    reporter = TerminalReporter(quiet=quiet)
    layer = None
    if boundary is not None:
        layer = int(boundary) if _NUMBER.fullmatch(boundary) else read_boundary(boundary)
    loaded = load_adapter(source, check_values=False)
    stripped = write_stripped(loaded, output, boundary=layer, keep=keep)
    reporter.note(_summary(len(loaded.modules()), len(stripped.modules())))
    if any(module.layer is None for module in stripped.modules()):
        reporter.note("modules outside the layers keep their LoRA")
    reporter.note(f"wrote {output}")


def _source(adapter: str | None) -> str:
    """Return where the adapter is read from; stdin unless it is a terminal."""
    if adapter is None and sys.stdin.isatty():
        raise click.UsageError("Missing argument '[ADAPTER]': stdin is a terminal, not a pipe.")
    return STDIO if adapter is None else adapter


def _summary(before: int, after: int) -> str:
    """Return a note on how many modules are left."""
    if before == after:
        return "no LoRA on the layers to strip: every tensor is kept"
    return f"kept {after} of {before} modules"
