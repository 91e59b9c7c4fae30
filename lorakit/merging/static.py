"""From adapters to one, without data: `merge` with a method of _methods.py.

It carries over what the methods know nothing of: which modules the config selects, the number
format, the base, the chat choice, the blocks and the history. One module is merged at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lorakit.adapters.adapter import Adapter, Factor, LoraModule, lora_name
from lorakit.adapters.base_model import base_name, check_fingerprint
from lorakit.adapters.blocks import Block, Slice, block_names, plain_name, unique_names
from lorakit.adapters.config import peft_config
from lorakit.adapters.history import joined_history
from lorakit.adapters.names import natural_key
from lorakit.adapters.portable import make_portable
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.tensors import FloatArray, Tensor
from lorakit.errors import LorakitError
from lorakit.merging.methods import METHODS
from lorakit.merging.stack import check_widths
from lorakit.merging.task_vectors import Part
from lorakit.settings import StaticSettings
from lorakit.versions import version_of

Note = Callable[[str], None]
Parts = Mapping[str, Sequence[Part]]  # by module
_SELECTION = ("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules")
_KEPT = ("auto_mapping", "revision", "task_type")  # of the config, where all adapters agree


def merge_statically(
    adapters: Sequence[Adapter],
    method: str,
    *,
    settings: StaticSettings,
    output: str,
    note: Note,
    portable: bool = False,
) -> None:
    """Merge adapters without data by a method of METHODS and write them to `output` as one.

    Raises LorakitError for adapters that do not fit together and for sums beyond float32.
    """
    merged = merge_adapters(adapters, method, settings=settings, note=note, portable=portable)
    save_adapter(merged, output)


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str,
    *,
    settings: StaticSettings,
    note: Note,
    portable: bool = False,
) -> Adapter:
    """Return the adapters merged into one, at scale 1; `note` is told what they do not agree on.

    Tensors are float32, or have the adapters' own format where that holds every value exactly (as
    for `cat` with weights and scales that are powers of two).
    """
    settings = replace(
        settings,
        weights=settings.weights or (1.0,) * len(adapters),
        rank=settings.rank or max(module.rank for each in adapters for module in each.modules()),
    )
    parts = parts_by_module(adapters, settings.weights or ())
    tensors = _merged_tensors(parts, method, settings, common_format(adapters))
    ranks = {name: tensors[lora_name(name, "A")].shape[0] for name in parts}
    merged = Adapter(tensors, merged_config(adapters, ranks))
    blocks = cat_blocks(adapters, parts) if method == "cat" else []
    entry = _history_entry(adapters, method, settings, portable)
    told = [block.header(_share_of_zeros(block, merged)) for block in blocks]
    merged = replace(merged, header=_header(adapters, entry, told, note))
    return make_portable(merged) if portable else merged


def parts_by_module(adapters: Sequence[Adapter], weights: Sequence[float]) -> Parts:
    """Return what each module is merged from, in the order of the adapters.

    Raises LorakitError naming the module and both shapes where two adapters disagree on its widths.
    """
    parts: dict[str, list[Part]] = {}
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for module in adapter.modules():
            there = parts.setdefault(module.name, [])
            check_widths([part.module for part in there], module, adapter)
            there.append(Part(module, weight, number))
    return {name: parts[name] for name in sorted(parts, key=natural_key)}


def common_format(adapters: Sequence[Adapter]) -> str:
    """Return the number format that all tensors of the adapters have, or F32 where they differ."""
    formats = {tensor.dtype for adapter in adapters for tensor in adapter.tensors.values()}
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
    for name, group in parts.items():
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                pair = METHODS[method].merge(group, settings)
        except np.linalg.LinAlgError:  # an SVD of what is not finite
            raise _beyond(name) from None
        for factor, values in zip(_FACTORS, pair, strict=True):
            if not np.isfinite(values).all():
                raise _beyond(name)
            yield lora_name(name, factor), values


def _beyond(name: str) -> LorakitError:
    return LorakitError(f"the merge of {name} is beyond float32; use smaller --weights")


_FACTORS: tuple[Factor, Factor] = ("A", "B")


def merged_config(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the config of modules of these ranks at scale 1 that selects what the adapters select.

    Names stay as short as they were where the adapters select alike, or by names alone.
    """
    configs = [adapter.config for adapter in adapters]
    bases = [name for adapter in adapters if (name := base_name(adapter))]
    config = peft_config(
        ranks,
        base=bases[0] if bases else None,
        transposed=any(config.get("fan_in_fan_out") for config in configs),
    )
    for key in _KEPT:
        if _agree(configs, key):
            config[key] = configs[0].get(key)
    return {**config, **_selection(configs)}


def _selection(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the keys of PEFT's config that select the modules, or none: all full names."""
    if all(_agree(configs, key) for key in _SELECTION):
        return {key: configs[0].get(key) for key in _SELECTION}
    targets = [config.get("target_modules") for config in configs]
    others = (config.get(key) for config in configs for key in _SELECTION[:-1])
    if not any(others) and all(isinstance(names, list) for names in targets):
        return {"target_modules": sorted({name for names in targets for name in names or ()})}
    return {}


def _agree(configs: Sequence[Mapping[str, Any]], key: str) -> bool:
    values = [config.get(key) for config in configs]
    plain = {json.dumps(sorted(v) if isinstance(v, list) else v, sort_keys=True) for v in values}
    return len(plain) == 1


def cat_blocks(adapters: Sequence[Adapter], parts: Parts) -> list[Block]:
    """Return where each adapter, or each block of one that was itself merged, lies side by side.

    A slice's scale is the factor from the block's own B to the one in the file.
    """
    sources = [(n, block) for n, adapter in enumerate(adapters) for block in _blocks_of(adapter)]
    names = unique_names(block.name for _, block in sources)
    return [
        replace(block, name=name, modules=dict(_moved(block, number, parts)))
        for name, (number, block) in zip(names, sources, strict=True)
    ]


def _moved(block: Block, number: int, parts: Parts) -> Iterator[tuple[str, Slice]]:
    """Yield a block's slices, moved to where adapter `number` lies and scaled as it is."""
    for name, inner in block.modules.items():
        offset = sum(part.module.rank for part in parts[name] if part.adapter < number)
        factor = next(part.factor for part in parts[name] if part.adapter == number)
        yield name, Slice(offset + inner.offset, inner.rank, factor * inner.scale)


def _blocks_of(adapter: Adapter) -> list[Block]:
    """Return the blocks in an adapter's header where they are told in full, else all of it."""
    told = adapter.header.get("blocks") or []
    try:
        return [_read_block(block) for block in told] or [_whole(adapter)]
    except (KeyError, TypeError):
        return [_whole(adapter)]


def _read_block(block: Mapping[str, Any]) -> Block:
    modules = {
        name: Slice(int(part["offset"]), int(part["rank"]), float(part["scale"]))
        for name, part in block["modules"].items()
    }
    return Block(str(block["name"]), str(block["sha256"]), modules)


def _whole(adapter: Adapter) -> Block:
    modules = {module.name: Slice(0, module.rank, 1.0) for module in adapter.modules()}
    return Block(plain_name(adapter), adapter.sha256, modules)


def _share_of_zeros(block: Block, merged: Adapter) -> float:
    pairs: dict[str, LoraModule] = {module.name: module for module in merged.modules()}
    zeros = count = 0
    for name, part in block.modules.items():
        for values in (pairs[name].a[part.span], pairs[name].b[:, part.span]):
            zeros += values.size - int(np.count_nonzero(values))
            count += values.size
    return zeros / count if count else 0.0


def _history_entry(
    adapters: Sequence[Adapter], method: str, settings: StaticSettings, portable: bool
) -> dict[str, Any]:
    told: dict[str, Any] = {"method": method}
    for name in METHODS[method].settings:
        value = getattr(settings, name)
        told[name] = float(value) if name == "density" else value
    if "weights" in told:
        told["weights"] = list(told["weights"])
    hashes = [adapter.sha256 for adapter in adapters]
    return {
        "command": "merge",
        "versions": {name: version_of(name) for name in ("lorakit", "numpy")},
        "settings": {**told, "portable": True} if portable else told,
        "parents": dict(zip(block_names(adapters), hashes, strict=True)),
    }


def _header(
    adapters: Sequence[Adapter],
    entry: Mapping[str, Any],
    blocks: Sequence[Mapping[str, Any]],
    note: Note,
) -> dict[str, Any]:
    headers = [adapter.header for adapter in adapters]
    told = {"format": 1, **_base(adapters, note), **_chat(headers, note)}
    told["history"] = [*joined_history(headers), entry]
    return {**told, "blocks": list(blocks)} if blocks else told


def _base(adapters: Sequence[Adapter], note: Note) -> dict[str, Any]:
    """Return the record of the first base model named; warn where the adapters differ in it."""
    named = {adapter.name: name for adapter in adapters if (name := base_name(adapter))}
    if not named:
        return {}
    first = next(iter(named.values()))
    if len({name.rstrip("/") for name in named.values()}) > 1:
        listed = ", ".join(f"{adapter} ({name})" for adapter, name in named.items())
        note(f"Warning: the adapters name different base models: {listed}; {first} is recorded")
    alike = [each for each in adapters if base_name(each) == first and each.header.get("base")]
    if not alike:
        return {}
    base = alike[0].header["base"]
    if warning := check_fingerprint(alike, first, base.get("fingerprint") or ""):
        note(warning)
    return {"base": base}


def _chat(headers: Sequence[Mapping[str, Any]], note: Note) -> dict[str, Any]:
    """Return the chat choice of the adapters that tell one, if they agree on it."""
    told = [header for header in headers if header.get("chat")]
    if len({header["chat"] for header in told}) > 1:
        note(
            "Warning: some of the adapters were trained with the chat template and some without; "
            "the merged one tells neither: choose by --chat on or --chat off"
        )
        return {}
    return {key: told[0][key] for key in ("chat", "chat_date") if told and told[0].get(key)}
