"""`lorakit scale-layers`: an adapter whose upper layers change the model less, or more."""

from __future__ import annotations

import re

import click

from lorakit.commands import _options
from lorakit.commands._types import Real
from lorakit.files import STDIO

_NUMBER = re.compile(r"[0-9]{1,9}")


@click.command("scale-layers")
@click.argument("adapter", required=False)
@click.option(
    "--from",
    "from_layer",
    required=True,
    metavar="K",
    help="The lowest layer to scale: a number, or find-boundary's records (a file or `-`).",
)
@click.option(
    "--factor",
    type=Real(),
    metavar="λ",
    help="What the change is multiplied by; 0 is no LoRA. [default: the best record's]",
)
@_options.output("scaled.safetensors", "the scaled adapter")
@_options.quiet
def scale_layers(
    adapter: str | None, from_layer: str, factor: float | None, output: str, quiet: bool
) -> None:
    """Multiply what the LoRA of all layers from --from on changes by --factor.

    ADAPTER is a file, a PEFT folder, `-` (the default: a pipe) or hf://owner/name[@revision]. λ is
    folded into B, which every program reads; a B in 16 bits becomes float32 where it cannot hold
    the products exactly. All else stays byte for byte. At 1 the adapter is itself, at 0 the model
    is that of `strip-layers --boundary K`. Of find-boundary's records the best is taken, with its
    `factor` unless --factor is given.

    \b
    lorakit scale-layers merged.safetensors --from 15 --factor 0.5 -o soft.safetensors
    """
    if re.fullmatch(r"-[0-9]+", from_layer):
        raise click.BadParameter(f"{from_layer} is below 0.", param_hint="'--from'")
    if factor is None and _NUMBER.fullmatch(from_layer):
        raise click.UsageError("Missing option '--factor': a layer's number names none.")
    source = _options.adapter_source(adapter)
    _options.check_stdin(source, from_layer)
    from lorakit.adapters.storage import load_adapter
    from lorakit.boundary.scale import is_scaled, write_scaled
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import refuse_terminal

    if output == STDIO:
        refuse_terminal("an adapter")
    reporter = TerminalReporter(quiet=quiet)
    layer, factor = _resolved(from_layer, factor)
    loaded = load_adapter(source, plain=False)
    written = write_scaled(loaded, output, from_layer=layer, factor=factor)
    modules = loaded.modules()
    count = sum(is_scaled(module, layer) for module in modules)
    if count:
        reporter.note(f"scaled {count} of {len(modules)} modules by {factor:g}")
    else:
        reporter.note(f"no LoRA from layer {layer} on: every tensor is kept")
    pairs = zip(modules, written.modules(), strict=True)
    if widened := sum(old.tensor_b.dtype != new.tensor_b.dtype for old, new in pairs):
        reporter.note(f"B of {widened} modules is float32 now, to hold the products")
    reporter.note(f"wrote {output}")


def _resolved(from_layer: str, factor: float | None) -> tuple[int, float]:
    """Return the layer and the factor: those written out, else those of the best record."""
    from lorakit.boundary.records import read_soft_boundary
    from lorakit.errors import LorakitError
    from lorakit.files import input_name

    if factor is not None and _NUMBER.fullmatch(from_layer):
        return int(from_layer), factor
    layer, of_best = read_soft_boundary(from_layer)
    chosen = of_best if factor is None else factor
    if chosen is None:
        raise LorakitError(
            f"{input_name(from_layer)}: the best record has no factor; give --factor"
        )
    return layer, chosen
