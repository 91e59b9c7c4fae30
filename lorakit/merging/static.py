"""Merges without data: several adapters into one by a method of METHODS.

The methods merge one module at a time and know nothing else. Everything else is done here: which
modules the config selects, the number format, the base, the chat choice, blocks and history.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.base_model import base_name, check_fingerprint
from lorakit.adapters.blocks import (
    Block,
    BlockFields,
    Slice,
    block_names,
    plain_name,
    read_blocks,
    share_of_zeros,
    unique_names,
)
from lorakit.adapters.history import (
    CHAT_FIELDS,
    BaseFields,
    Header,
    HistoryEntry,
    base_fields,
    new_entry,
    new_header,
)
from lorakit.adapters.names import FACTORS, lora_name, natural_key
from lorakit.adapters.portable import make_portable
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.targets import merged_config
from lorakit.adapters.tensors import FloatArray, Pair, Tensor
from lorakit.errors import LorakitError
from lorakit.merging.agreement import check_no_dora, common_whole
from lorakit.merging.layer_weights import Runs, runs_by_adapter, runs_text, weight_at
from lorakit.merging.methods import METHODS
from lorakit.merging.spectrum import fit_lines, layer_fits
from lorakit.merging.stack import check_widths
from lorakit.merging.task_vectors import Part
from lorakit.reporting import Reporter, Silent
from lorakit.settings import StaticSettings
from lorakit.versions import version_of

Parts = Mapping[str, Sequence[Part]]  # by module
_ONLY_IF_SET = ("rank", "keep_energy", "max_rank")  # settings that the history else leaves out


def merge_statically(
    adapters: Sequence[Adapter],
    method: str,
    *,
    settings: StaticSettings,
    output: str,
    reporter: Reporter | None = None,
    portable: bool = False,
) -> None:
    """Merge adapters without data by a method of METHODS and write them to `output` as one.

    Raises LorakitError for adapters that do not fit together and for sums beyond float32.
    """
    merged = merge_adapters(
        adapters, method, settings=settings, reporter=reporter, portable=portable
    )
    save_adapter(merged, output)


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str,
    *,
    settings: StaticSettings,
    reporter: Reporter | None = None,
    portable: bool = False,
) -> Adapter:
    """Return the adapters merged into one, at scale 1; warn of what they disagree on.

    A and B are float32, or in the adapters' own format if that holds every value exactly (as for
    `cat` with weights and scales that are powers of two). Whole weights stay as they are. Raises
    LorakitError where adapters differ in these, and for DoRA.
    """
    check_no_dora(adapters)
    weights = settings.weights or (1.0,) * len(adapters)
    largest = max(module.rank for adapter in adapters for module in adapter.modules())
    settings = replace(settings, weights=weights, rank=settings.rank or largest)
    names = block_names(adapter.name for adapter in adapters)
    runs = runs_by_adapter(dict(settings.weights_by_layer or ()), names)
    parts = parts_by_module(adapters, weights, runs)
    whole = common_whole(adapters, parts)
    tensors = _merged_tensors(parts, method, settings, common_format(adapters)) | whole
    ranks = {name: tensors[lora_name(name, "A")].shape[0] for name in parts}
    bases = [name for adapter in adapters if (name := base_name(adapter))]
    configs = [adapter.config for adapter in adapters]
    config = merged_config(configs, ranks, base=bases[0] if bases else None)
    merged = Adapter(tensors, config)
    entry = _history_entry(adapters, method, settings, portable)
    blocks = cat_blocks(adapters, parts) if method == "cat" else []
    reporter = reporter or Silent()
    header = _merged_header(adapters, entry, _block_fields(blocks, merged), reporter)
    merged = replace(merged, header=header)
    if settings.keep_energy is not None:
        for line in fit_lines(layer_fits(merged, parts)):
            reporter.note(line)
    return make_portable(merged) if portable else merged


def _merged_header(
    adapters: Sequence[Adapter],
    entry: HistoryEntry,
    blocks: Sequence[BlockFields],
    reporter: Reporter,
) -> Header:
    """Return the merged adapter's header; warn if the adapters disagree on base or chat."""
    headers = [adapter.header for adapter in adapters]
    base, chat = _recorded_base(adapters, reporter), _chat_fields(headers, reporter)
    return new_header(entry, parents=headers, base=base, chat=chat, blocks=blocks)


def parts_by_module(
    adapters: Sequence[Adapter], weights: Sequence[float], runs: Sequence[Runs]
) -> Parts:
    """Return the parts of each module, in the order of the adapters.

    A part's weight is its adapter's, times that of the module's layer in the adapter's runs.
    Raises LorakitError naming the module and both shapes if two adapters disagree on its widths.
    """
    parts: dict[str, list[Part]] = {}
    weighted = zip(adapters, weights, runs, strict=True)
    for number, (adapter, weight, by_layer) in enumerate(weighted):
        for module in adapter.modules():
            earlier = parts.setdefault(module.name, [])
            check_widths([part.module for part in earlier], module, adapter)
            factor = weight_at(by_layer, module.layer)
            earlier.append(Part(module, weight * factor, number))
    return {name: parts[name] for name in sorted(parts, key=natural_key)}


def common_format(adapters: Sequence[Adapter]) -> str:
    """Return the number format of all A and B of the adapters, or F32 if they differ."""
    modules = [module for adapter in adapters for module in adapter.modules()]
    formats = {tensor.dtype for m in modules for tensor in (m.tensor_a, m.tensor_b)}
    return formats.pop() if len(formats) == 1 else "F32"


def _merged_tensors(
    parts: Parts, method: str, settings: StaticSettings, dtype: str
) -> dict[str, Tensor]:
    """Return the merged tensors in a number format, or in F32 if it cannot hold them exactly."""
    tensors = {}
    for key, values in _merged_factors(parts, method, settings):
        tensors[key] = Tensor.from_array(values, dtype)
        if dtype != "F32" and not np.array_equal(tensors[key].array(), values):
            return _merged_tensors(parts, method, settings, "F32")
    return tensors


def _merged_factors(
    parts: Parts, method: str, settings: StaticSettings
) -> Iterator[tuple[str, FloatArray]]:
    """Yield the merged A and B of each module, in float32, by PEFT's names."""
    merge = METHODS[method].merge
    for name, module_parts in parts.items():
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                pair = merge(module_parts, settings)
        except np.linalg.LinAlgError:  # an SVD of values that are not finite
            raise _overflow(name) from None
        for factor, values in zip(FACTORS, pair, strict=True):
            if not np.isfinite(values).all():
                raise _overflow(name)
            yield lora_name(name, factor), values


def _overflow(module: str) -> LorakitError:
    return LorakitError(f"the merge of {module} is beyond float32; use smaller --weights")


def cat_blocks(adapters: Sequence[Adapter], parts: Parts) -> list[Block]:
    """Return the blocks of a `cat` merge: each adapter, or each block of one merged before.

    A slice's scale is the factor from the block's original B to the one in the merged file.
    """
    sources = [(i, block) for i, adapter in enumerate(adapters) for block in _blocks_of(adapter)]
    names = unique_names(block.name for _, block in sources)
    return [
        replace(block, name=name, modules=dict(_moved(block, number, parts)))
        for name, (number, block) in zip(names, sources, strict=True)
    ]


def _moved(block: Block, number: int, parts: Parts) -> Iterator[tuple[str, Slice]]:
    """Yield a block's slices, moved and scaled as adapter `number` is in the merge."""
    for name, inner in block.modules.items():
        offset = sum(part.module.rank for part in parts[name] if part.adapter < number)
        factor = next(part.factor for part in parts[name] if part.adapter == number)
        yield name, Slice(offset + inner.offset, inner.rank, factor * inner.scale)


def _blocks_of(adapter: Adapter) -> list[Block]:
    """Return the blocks of an adapter; if its header has no complete ones, all of it is one."""
    return read_blocks(adapter.header.get("blocks")) or [_whole(adapter)]


def _whole(adapter: Adapter) -> Block:
    """Return a block that covers the whole adapter."""
    modules = {module.name: Slice(0, module.rank, 1.0) for module in adapter.modules()}
    return Block(plain_name(adapter.name), adapter.sha256, modules)


def _block_fields(blocks: Sequence[Block], merged: Adapter) -> list[BlockFields]:
    """Return the blocks of the merged adapter as its header has them."""
    modules = {module.name: module for module in merged.modules()}

    def pairs(block: Block) -> Iterator[Pair]:
        for name, part in block.modules.items():
            yield modules[name].a[part.span], modules[name].b[:, part.span]

    return [block.fields(share_of_zeros(pairs(block))) for block in blocks]


def _history_entry(
    adapters: Sequence[Adapter], method: str, settings: StaticSettings, portable: bool
) -> HistoryEntry:
    """Return the history entry of the merge, with the settings that the method reads."""
    runs = {name: runs_text(by_layer) for name, by_layer in settings.weights_by_layer or ()}
    values: dict[str, object] = {
        "weights": list(settings.weights),
        "density": float(settings.density),
        "rank": settings.rank if settings.keep_energy is None else None,
        "keep_energy": None if settings.keep_energy is None else float(settings.keep_energy),
        "max_rank": settings.max_rank,
        "seed": settings.seed,
    }
    names = block_names(adapter.name for adapter in adapters)
    return new_entry(
        "merge",
        versions={package: version_of(package) for package in ("lorakit", "numpy")},
        settings={
            "method": method,
            **{
                name: values[name]
                for name in METHODS[method].settings
                if values[name] is not None or name not in _ONLY_IF_SET
            },
            **({"weights_by_layer": runs} if runs else {}),
            **({"portable": True} if portable else {}),
        },
        parents=dict(zip(names, (adapter.sha256 for adapter in adapters), strict=True)),
    )


def _recorded_base(adapters: Sequence[Adapter], reporter: Reporter) -> BaseFields | None:
    """Return what is recorded about the first base model named; warn if the bases differ."""
    bases = {adapter.name: name for adapter in adapters if (name := base_name(adapter))}
    if not bases:
        return None
    first = next(iter(bases.values()))
    if len({name.rstrip("/") for name in bases.values()}) > 1:
        listed = ", ".join(f"{adapter} ({name})" for adapter, name in bases.items())
        reporter.note(
            f"Warning: the adapters name different base models: {listed}; {first} is recorded"
        )
    alike = [a for a in adapters if base_name(a) == first and base_fields(a.header)]
    if not alike:
        return None
    base = base_fields(alike[0].header)
    if warning := check_fingerprint(alike, first, base.get("fingerprint") or ""):
        reporter.note(warning)
    return base


def _chat_fields(headers: Sequence[Header], reporter: Reporter) -> dict[str, object]:
    """Return the header's chat fields if the adapters that have them agree; else warn."""
    choices = {chat for header in headers if (chat := header.get("chat"))}
    rest = {json.dumps(_stored_chat(h), sort_keys=True) for h in headers if h.get("chat")}
    if len(choices) == 1 and len(rest) > 1:
        reporter.note(
            "Warning: the adapters were trained with different --system or --chat-arg; the merged "
            "one has those of the first"
        )
    if len(choices) > 1:
        reporter.note(
            "Warning: some of the adapters were trained with the chat template and some without; "
            "the merged one tells neither: choose by --chat on or --chat off"
        )
        return {}
    first = next((header for header in headers if header.get("chat")), Header())
    return _stored_chat(first)


def _stored_chat(header: Header) -> dict[str, object]:
    """Return what a header says of chat, without what is empty."""
    return {name: value for name, value in header.items() if name in CHAT_FIELDS and value}
