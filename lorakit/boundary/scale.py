"""Scaling: an adapter whose upper layers change the model less, or more; a soft boundary.

The change ΔW = s·B·A of the layers from one on is multiplied by a factor λ: at 1 the adapter is
itself, at 0 the model computes what it does with those layers stripped. λ is folded into B, since
that is what every program reads: vLLM and llama.cpp ignore PEFT's alpha_pattern. No other tensor
changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lorakit.adapters.adapter import Adapter, LoraModule
from lorakit.adapters.blocks import BlockFields, slices_of
from lorakit.adapters.history import Header, new_entry, with_entry
from lorakit.adapters.names import layer_of, lora_name
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.boundary.strip import BASE_ADVICE, blocks_left, check_one_list_of_layers, parents_of
from lorakit.errors import LorakitError
from lorakit.versions import version_of


def write_scaled(adapter: Adapter, output: str, *, from_layer: int, factor: float) -> Adapter:
    """Scale the adapter as scale_layers does, write the result to `output` and return it."""
    scaled = scale_layers(adapter, from_layer=from_layer, factor=factor)
    save_adapter(scaled, output)
    return scaled


def scale_layers(adapter: Adapter, *, from_layer: int, factor: float) -> Adapter:
    """Return the adapter with the ΔW of the layers from `from_layer` on multiplied by `factor`.

    Each product is rounded once, to float32, and B keeps its number format if that holds the
    products exactly, as it does for powers of two; else B becomes float32. Modules outside the
    layers, whole weights among them, stay as they are. The blocks' scales follow.

    Raises LorakitError if nothing but zeros is left, if a product is too large, for whole weights
    and for DoRA on those layers, and if the adapter
    has no layers or two lists of them, so that a number means two.
    """
    check_one_list_of_layers(adapter)
    upper = [module for module in adapter.modules() if is_scaled(module, from_layer)]
    if factor == 0 and len(upper) == len(adapter.modules()):
        raise LorakitError(
            f"factor 0 from layer {from_layer} on leaves no LoRA in {adapter.name}; {BASE_ADVICE}"
        )
    if factor != 1:
        _check_scalable(adapter, upper, from_layer)
    scaled = {} if factor == 1 else dict(_scaled_b(adapter, upper, factor))
    result = replace(adapter, tensors={**adapter.tensors, **scaled})
    return replace(result, header=_scaled_header(adapter, result, upper, from_layer, factor))


def is_scaled(module: LoraModule, from_layer: int) -> bool:
    """Return whether a module is on one of the layers from `from_layer` on."""
    return _is_upper(module.layer, from_layer)


def _is_upper(layer: int | None, from_layer: int) -> bool:
    return layer is not None and layer >= from_layer


def _check_scalable(adapter: Adapter, upper: Sequence[LoraModule], from_layer: int) -> None:
    """Raise LorakitError for what cannot be scaled without the base: whole weights and DoRA."""
    whole = [name for name in adapter.whole if _is_upper(layer_of(name), from_layer)]
    if whole or (upper and adapter.is_dora):
        what = f"{whole[0]} whole" if whole else f"{upper[0].name} with DoRA's magnitude"
        raise LorakitError(
            f"{adapter.name} holds {what}, and how that differs from the base is not known here; "
            "strip the layers, or fuse the adapter as it is"
        )


def _scaled_b(
    adapter: Adapter, modules: Sequence[LoraModule], factor: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the scaled B of each module."""
    for module in modules:
        with np.errstate(over="ignore"):
            values = (module.b.astype(np.float64) * factor).astype(np.float32)
        if not np.isfinite(values).all():
            raise LorakitError(
                f"{adapter.name}: {module.name} times {factor:g} is too large for float32; "
                "give a smaller --factor"
            )
        yield lora_name(module.name, "B"), Tensor.exactly(values, module.tensor_b.dtype)


def _scaled_header(
    adapter: Adapter,
    scaled: Adapter,
    upper: Sequence[LoraModule],
    from_layer: int,
    factor: float,
) -> Header:
    """Return the header with the blocks' new scales and shares of zeros, and a new entry."""
    entry = new_entry(
        "scale-layers",
        versions={"lorakit": version_of("lorakit")},
        settings={"from": from_layer, "factor": factor},
        parents=parents_of(adapter, adapter.sha256),
    )
    header = with_entry(adapter.header, entry)
    if (blocks := header.get("blocks")) and upper and factor != 1:
        names = {module.name for module in upper}
        changed = [_scaled_block(block or {}, names, factor) for block in blocks]
        header["blocks"] = list(blocks_left(changed, scaled.modules()))
    return header


def _scaled_block(block: BlockFields, modules: Collection[str], factor: float) -> BlockFields:
    """Return a header's block with the scale of `modules` multiplied, where it is known.

    The share `reset` is dropped: what is scaled stands at its reset value no longer.
    """
    slices = slices_of(block)
    for name in slices.keys() & modules:
        scale = slices[name].get("scale")
        if scale is not None:
            slices[name] = {**slices[name], "scale": scale * factor}
    scaled: BlockFields = {**block, "modules": slices}
    if slices.keys() & modules:
        scaled.pop("reset", None)
    return scaled
