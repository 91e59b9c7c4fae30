"""Stripping: an adapter without the LoRA of some decoder layers, tensors and config together.

The boundary-layer paper (lora-inference-necessity) keeps the LoRA of the bottom layers only. What
is kept stays byte for byte and computes what it computed; nothing here reads a value but to count
the zeros of blocks. How many layers the model has is not written in an adapter, and not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.adapters.adapter import Adapter, LoraModule, lora_name
from lorakit.adapters.blocks import block_names
from lorakit.adapters.config import Config, is_targeted, pattern_of
from lorakit.adapters.foreign import quote
from lorakit.adapters.history import FORMAT
from lorakit.adapters.names import layer_of, stack_of
from lorakit.adapters.storage import save_adapter
from lorakit.errors import LorakitError

_PENDING = "0" * 64  # stands for a hash until it is known
_BASE_ADVICE = "use the base model without an adapter"


def write_stripped(
    adapter: Adapter,
    output: str,
    *,
    boundary: int | None = None,
    keep: Collection[int] | None = None,
) -> Adapter:
    """Strip the adapter as strip_layers does, write the result to `output` and return it.

    To look at all values of a large adapter and hash them takes longer than all else: that is done
    while the tensors are written, and its place in the header is filled in afterwards. Values that
    are not finite are an error then, and nothing is put in place.
    """
    from concurrent.futures import ThreadPoolExecutor

    stripped = strip_layers(adapter, boundary=boundary, keep=keep, sha256=_PENDING)
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(lambda: adapter.sha256)
        save_adapter(stripped, output, late=lambda: _with_parent(stripped, hashed.result()))
    return _with_parent(stripped, hashed.result())


def strip_layers(
    adapter: Adapter,
    *,
    boundary: int | None = None,
    keep: Collection[int] | None = None,
    sha256: str | None = None,
) -> Adapter:
    """Return the adapter without LoRA on layers from `boundary` on, or on those not in `keep`.

    Give one of the two. Modules outside the decoder layers (an output head) are kept: neither
    option names them. Where nothing goes, tensors and config are the same. `sha256` is that of the
    adapter, for the history, where it is known.
    Raises LorakitError where boundary is 0 or no module is left, which is the base model, and where
    the adapter has layers in two places (an encoder and a decoder), so that a number means two.
    """
    if boundary == 0:
        raise LorakitError(f"boundary 0 leaves no LoRA in {adapter.name}; {_BASE_ADVICE}")
    _check_one_stack(adapter)
    kept = [module for module in adapter.modules() if _stays(module, boundary, keep)]
    if not kept:
        chosen = f"below layer {boundary}" if keep is None else "on the layers to keep"
        raise LorakitError(f"{adapter.name} has no LoRA {chosen}; {_BASE_ADVICE}")
    names = {module.name for module in kept}
    tensors = {
        key: adapter.tensors[key]
        for module in kept
        for key in (lora_name(module.name, "A"), lora_name(module.name, "B"))
    }
    config = stripped_config(adapter, names)
    settings: Mapping[str, Any] = {"boundary": boundary} if keep is None else {"keep": sorted(keep)}
    header = _header(adapter, kept, settings, sha256 or adapter.sha256)
    return Adapter(tensors, config, header, adapter.name)


def _stays(module: LoraModule, boundary: int | None, keep: Collection[int] | None) -> bool:
    if module.layer is None:
        return True
    return module.layer in keep if keep is not None else module.layer < (boundary or 0)


def _check_one_stack(adapter: Adapter) -> None:
    stacks = {stack_of(module.name) for module in adapter.modules()} - {None}
    if len(stacks) > 1:
        first, second, *_ = sorted(str(stack) for stack in stacks)
        raise LorakitError(
            f"{adapter.name} has layers in {quote(first)} and in {quote(second)}, so a layer's "
            "number is ambiguous; strip adapters of models with one list of layers"
        )


def stripped_config(adapter: Adapter, kept: Collection[str]) -> dict[str, Any]:
    """Return the config under which PEFT builds exactly the modules `kept`, each as it was.

    A list of targets stays and `layers_to_transform` names the layers, as far as that selects the
    kept ones of the adapter's modules and no other; else the targets are the modules' full names.
    """
    config = dict(adapter.config)
    names = [module.name for module in adapter.modules()]
    if len(kept) == len(names):
        return config
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            used = {pattern_of(config, key, name) for name in kept}
            config[key] = {pattern: n for pattern, n in config[key].items() if pattern in used}
    short = _short_form(config, kept)
    if short is not None and {name for name in names if is_targeted(short, name)} == set(kept):
        return short
    whole = {"target_modules": sorted(kept), "layers_to_transform": None}
    return {**config, **whole, "layers_pattern": None, "exclude_modules": None}


def _short_form(config: Config, kept: Collection[str]) -> dict[str, Any] | None:
    """Return the config with its list of targets and the kept layers, or None where that may err.

    So it may for full names, which PEFT takes in any layer, and for layers that are not alike.
    """
    targets = config.get("target_modules")
    parts: dict[int, set[str]] = {}
    for name in kept:
        if (layer := layer_of(name)) is not None:
            parts.setdefault(layer, set()).add(name.partition(f".{layer}.")[2])
    alike = len({frozenset(inner) for inner in parts.values()}) == 1
    if (
        not isinstance(targets, list)
        or not alike
        or any(layer_of(part) in parts for part in targets)
    ):
        return None
    used = [part for part in targets if any(f".{name}".endswith(f".{part}") for name in kept)]
    return {**config, "target_modules": used, "layers_to_transform": sorted(parts)}


def _header(
    adapter: Adapter, kept: Sequence[LoraModule], settings: Mapping[str, Any], sha256: str
) -> dict[str, Any]:
    from importlib.metadata import version

    (name,) = block_names([adapter])
    entry = {
        "command": "strip-layers",
        "versions": {"lorakit": version("lorakit")},
        "settings": dict(settings),
        "parents": {name: sha256},
    }
    header = {"format": FORMAT, **adapter.header}
    if header.get("blocks"):
        header["blocks"] = list(_blocks(header["blocks"], kept))
    return {**header, "history": [*(header.get("history") or []), entry]}


def _with_parent(stripped: Adapter, sha256: str) -> Adapter:
    """Return the adapter with the hash of its parent in the last entry of its history."""
    *earlier, entry = stripped.header["history"]
    parents = dict.fromkeys(entry["parents"], sha256)
    header = {**stripped.header, "history": [*earlier, {**entry, "parents": parents}]}
    return replace(stripped, header=header)


def _blocks(
    blocks: Iterable[Mapping[str, Any] | None], kept: Sequence[LoraModule]
) -> Iterable[dict[str, Any]]:
    """Yield the blocks that still have a module, their share of zeros counted anew."""
    for block in blocks:
        slices = (block or {}).get("modules") or {}
        left = [module for module in kept if slices.get(module.name)]
        if block and left:
            modules = {module.name: slices[module.name] for module in left}
            yield {**block, "modules": modules, "zeros": _share_of_zeros(left, slices)}


def _share_of_zeros(
    modules: Iterable[LoraModule], slices: Mapping[str, Mapping[str, Any]]
) -> float:
    zeros = count = 0
    for module in modules:
        first = slices[module.name].get("offset") or 0
        span = slice(first, first + (slices[module.name].get("rank") or 0))
        for values in (module.a[span], module.b[:, span]):
            zeros += int((values == 0).sum())
            count += values.size
        module.tensor_a.release()
    return zeros / count if count else 0.0
