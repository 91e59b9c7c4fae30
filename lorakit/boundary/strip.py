"""Stripping: an adapter without the LoRA of some decoder layers, tensors and config together.

The boundary-layer paper (Chen et al.) keeps the LoRA of the bottom layers only. What is kept stays
the same byte for byte and computes the same; values are read only to count the zeros of blocks. An
adapter does not say how many layers its model has, and none of this needs to know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from lorakit.adapters.adapter import Adapter, LoraModule
from lorakit.adapters.blocks import (
    BlockFields,
    SliceFields,
    block_names,
    narrowed,
    pair_of,
    share_of_zeros,
    slices_of,
)
from lorakit.adapters.history import Header, HistoryEntry, new_entry, with_entry, with_parents
from lorakit.adapters.names import (
    layer_list_of,
    layer_of,
    lora_parts,
    magnitude_module,
    whole_name,
)
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.targets import stripped_config
from lorakit.adapters.tensors import Pair
from lorakit.adapters.whole import narrowed_config
from lorakit.boundary.layer_choice import LayerChoice
from lorakit.errors import LorakitError
from lorakit.foreign_text import quote
from lorakit.versions import version_of

_PENDING = "0" * 64  # placeholder for a hash that is not known yet
BASE_ADVICE = "use the base model without an adapter"


def write_stripped(
    adapter: Adapter,
    output: str,
    *,
    boundary: int | None = None,
    keep: Collection[int] | None = None,
    choice: LayerChoice | None = None,
) -> Adapter:
    """Strip the adapter as strip_layers does, write the result to `output` and return it.

    Checking and hashing all values of a large adapter takes longer than anything else, so it is
    done while the tensors are written, and the hash is put into the header afterwards. Raises
    LorakitError, leaving nothing at `output`, for values that are not finite.
    """
    from concurrent.futures import ThreadPoolExecutor

    stripped = strip_layers(adapter, boundary=boundary, keep=keep, choice=choice, sha256=_PENDING)
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(lambda: adapter.sha256)
        save_adapter(stripped, output, late=lambda: _with_parent(stripped, hashed.result()))
    return _with_parent(stripped, hashed.result())


def strip_layers(
    adapter: Adapter,
    *,
    boundary: int | None = None,
    keep: Collection[int] | None = None,
    choice: LayerChoice | None = None,
    sha256: str | None = None,
) -> Adapter:
    """Return the adapter without LoRA on layers from `boundary` on, or on those not in `keep`.

    Pass one of the two, or a `choice` made on data. A layer loses what the adapter replaces whole
    in it, too. Modules outside the decoder layers (an output head) always stay. If nothing is
    stripped, tensors and config are unchanged. `sha256` is the adapter's, for the history, if known
    already.

    Raises LorakitError if the boundary is 0 or no module is left, which is the base model, and if
    the adapter has no layers or two lists of them (an encoder and a decoder), so that a number
    means two layers.
    """
    if boundary == 0:
        raise LorakitError(f"boundary 0 leaves no LoRA in {adapter.name}; {BASE_ADVICE}")
    check_one_list_of_layers(adapter)
    keep = keep if choice is None else choice.layers
    remaining = [module for module in adapter.modules() if _stays(module, boundary, keep)]
    if not remaining:
        chosen = f"below layer {boundary}" if keep is None else "on the layers to keep"
        raise LorakitError(f"{adapter.name} has no LoRA {chosen}; {BASE_ADVICE}")
    names = {module.name for module in remaining}
    tensors = {
        key: tensor
        for key, tensor in adapter.tensors.items()
        if _is_left(key, names, boundary, keep)
    }
    config = stripped_config(adapter.config, [module.name for module in adapter.modules()], names)
    entry = _entry(adapter, boundary, keep, choice, sha256 or adapter.sha256)
    header = _stripped_header(adapter, remaining, entry)
    stripped = Adapter(tensors, config, header, adapter.name)
    return replace(stripped, config=narrowed_config(config, adapter.whole, stripped.whole))


def _stays(module: LoraModule, boundary: int | None, keep: Collection[int] | None) -> bool:
    """Return whether the module is outside the layers or on a layer that keeps its LoRA."""
    return _keeps(module.layer, boundary, keep)


def _is_left(
    key: str, modules: Collection[str], boundary: int | None, keep: Collection[int] | None
) -> bool:
    """Return whether a tensor stays: one of LoRA's on `modules`, or a whole weight elsewhere."""
    if (weight := whole_name(key)) is not None:
        return _keeps(layer_of(weight), boundary, keep)
    parts = lora_parts(key)
    return (parts[0] if parts else magnitude_module(key)) in modules


def _keeps(layer: int | None, boundary: int | None, keep: Collection[int] | None) -> bool:
    """Return whether a layer keeps what the adapter changes in it; None, outside all, does."""
    if layer is None:
        return True
    return layer in keep if keep is not None else layer < (boundary or 0)


def check_layers_are_named(adapter: Adapter) -> None:
    """Raise LorakitError if no name of the adapter's modules tells a layer."""
    modules = adapter.modules()
    if all(module.layer is None for module in modules):
        raise LorakitError(
            f"{adapter.name}: {quote(modules[0].name)} tells no layer, nor does the name of any "
            "other module with LoRA; only layers with a number can be cut or scaled"
        )


def check_one_list_of_layers(adapter: Adapter) -> None:
    """Raise LorakitError if the adapter has LoRA in two lists of layers, or in none."""
    check_layers_are_named(adapter)
    lists = {layer_list_of(module.name) for module in adapter.modules()} - {None}
    if len(lists) > 1:
        first, second, *_ = sorted(str(name) for name in lists)
        raise LorakitError(
            f"{adapter.name} has layers in {quote(first)} and in {quote(second)}, so a layer's "
            "number is ambiguous; strip adapters of models with one list of layers"
        )


def _entry(
    adapter: Adapter,
    boundary: int | None,
    keep: Collection[int] | None,
    choice: LayerChoice | None,
    sha256: str,
) -> HistoryEntry:
    """Return the history entry of the stripping; `sha256` is the adapter's."""
    parents = parents_of(adapter, sha256)
    if choice is not None:
        return new_entry(
            "strip-layers",
            versions=choice.versions,
            settings=choice.history_fields(),
            parents=parents,
            hashes={"data": choice.data},
        )
    return new_entry(
        "strip-layers",
        versions={"lorakit": version_of("lorakit")},
        settings={"boundary": boundary} if keep is None else {"keep": sorted(keep)},
        parents=parents,
    )


def _stripped_header(
    adapter: Adapter, remaining: Sequence[LoraModule], entry: HistoryEntry
) -> Header:
    """Return the adapter's header with the remaining blocks and an entry for the stripping."""
    header = with_entry(adapter.header, entry)
    if blocks := header.get("blocks"):
        header["blocks"] = list(blocks_left(blocks, remaining))
    return header


def _with_parent(stripped: Adapter, sha256: str) -> Adapter:
    """Return `stripped` with the hash of the adapter it came from in its history."""
    return replace(stripped, header=with_parents(stripped.header, parents_of(stripped, sha256)))


def parents_of(adapter: Adapter, sha256: str) -> dict[str, str]:
    """Return an adapter of this hash as the one parent that a history entry names."""
    return dict.fromkeys(block_names([adapter.name]), sha256)


def blocks_left(
    blocks: Sequence[BlockFields], remaining: Sequence[LoraModule]
) -> Iterator[BlockFields]:
    """Yield the blocks that still have a module, with their share of zeros recounted."""
    for block in blocks:
        slices = slices_of(block or {})
        left = [module for module in remaining if slices.get(module.name)]
        if left:
            modules = {module.name: slices[module.name] for module in left}
            yield narrowed(block, modules, share_of_zeros(_pairs(left, modules)))


def _pairs(modules: Sequence[LoraModule], slices: Mapping[str, SliceFields]) -> Iterator[Pair]:
    """Yield a block's rows of A and columns of B in each module, releasing memory as it goes."""
    for module in modules:
        yield pair_of(slices[module.name], module.a, module.b)
        module.tensor_a.release()
