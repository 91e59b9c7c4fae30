"""What an adapter may hold besides A and B: whole weights of the base's, and DoRA's magnitudes.

Whole weights are those of PEFT's `modules_to_save`, and the embeddings and output head that PEFT
saves with `save_embedding_layers`. Which of them a config makes PEFT load is told here, and what
commands say that know A and B alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import Config
from lorakit.adapters.foreign import refuse_tensor
from lorakit.adapters.names import (
    lora_name,
    magnitude_module,
    magnitude_name,
    module_names,
    whole_key,
    whole_name,
)
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from lorakit.foreign_text import quote

# Input embeddings and output heads, which PEFT saves without naming them in its config.
_EMBEDDINGS = re.compile(r"(.*\.)?(embed\w*|word_embeddings|wte|wpe|lm_head)\.weight")


def check_kept(tensors: Mapping[str, Tensor], config: Config, name: str) -> None:
    """Raise LorakitError for magnitudes and whole weights that PEFT would drop, or that lack.

    `name` is what messages call the adapter.
    """
    modules = module_names(tensors)
    for key in sorted(tensors):
        module, weight = magnitude_module(key), whole_name(key)
        if module is not None and not (config.get("use_dora") and module in modules):
            refuse_tensor(key, name)
        if weight is None or _is_copy(key, weight, tensors):
            continue
        if not _is_loaded(key, weight, modules, config):
            refuse_tensor(key, name)
    if not modules:
        refuse_tensor(min(tensors), name)
    if config.get("use_dora"):
        for module in modules:
            _check_magnitude(tensors, module, name)


def _is_copy(key: str, weight: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether PEFT wrote an embedding under other names too, and uses only its own."""
    own = tensors.get(whole_key(weight, ()))
    is_copy = key.endswith(".modules_to_save.weight") and own and own.data == tensors[key].data
    return bool(is_copy) or (key.endswith(".original_module.weight") and own is not None)


def _is_loaded(key: str, weight: str, modules: Sequence[str], config: Config) -> bool:
    """Return whether PEFT loads the tensor `key` in place of the base's `weight`.

    The weight of a module with LoRA is that of its `base_layer`.
    """
    module = weight.rpartition(".")[0]
    if module in modules or key != whole_key(weight, ()):
        return key == whole_key(weight, modules)
    return _EMBEDDINGS.fullmatch(weight) is not None or is_saved(config, module)


def is_saved(config: Config, module: str) -> bool:
    """Return whether modules_to_save names a module, or one that it is a part of, as PEFT reads it.

    PEFT compares the ends of names, whether a part begins there or not.
    """
    names = config.get("modules_to_save") or []
    return any(owner.endswith(name) for owner in _with_owners(module) for name in names)


def _with_owners(module: str) -> Iterator[str]:
    """Yield a module's name, then those of the modules that it is a part of."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _check_magnitude(tensors: Mapping[str, Tensor], module: str, name: str) -> None:
    key, rows = magnitude_name(module), tensors[lora_name(module, "B")].shape[:1]
    if key not in tensors:
        raise LorakitError(f"{name}: {quote(module)} has no lora_magnitude_vector; take a new copy")
    if tensors[key].shape != rows:
        raise LorakitError(
            f"{name}: tensor {quote(key)} has shape {tensors[key].shape}, not {rows} as B's rows; "
            "take a new copy"
        )


def check_plain(adapter: Adapter, reader: str = "this command", fused: str = "-o fused/") -> None:
    """Raise LorakitError for an adapter that holds more than A and B, and name the way out.

    `reader` is what cannot read it, and `fused` how `fuse` is told to write what it can.
    """
    if adapter.whole:
        what = f"{quote(next(iter(adapter.whole)))} whole, besides LoRA"
    elif adapter.is_dora:
        what = "DoRA's magnitudes besides A and B"
    else:
        return
    raise LorakitError(
        f"{adapter.name} holds {what}, which {reader} cannot read; fuse it and go on with that "
        f"model: lorakit fuse {shlex.quote(adapter.name)} {fused}"
    )


def check_plain_or_embeddings(adapter: Adapter) -> None:
    """Raise LorakitError as check_plain does, but not for embeddings and heads.

    PEFT saves these unchanged, too, and whether they are the base's own tells the base.
    """
    if adapter.is_dora or not all(map(_EMBEDDINGS.fullmatch, adapter.whole)):
        check_plain(adapter)


def without_whole(adapter: Adapter, names: Collection[str]) -> Adapter:
    """Return the adapter without the whole weights of these names."""
    tensors = {k: t for k, t in adapter.tensors.items() if whole_name(k) not in names}
    rest = replace(adapter, tensors=tensors)
    return replace(rest, config=narrowed_config(adapter.config, adapter.whole, rest.whole))


def narrowed_config(
    config: Config, whole: Mapping[str, Tensor], left: Mapping[str, Tensor]
) -> Config:
    """Return the config whose modules_to_save names only what is left of the whole weights."""
    if not config.get("modules_to_save") or whole.keys() == left.keys():
        return config
    modules = {weight.rpartition(".")[0] for weight in left}
    names = sorted(module for module in modules if is_saved(config, module))
    return {**config, "modules_to_save": names or None}
