"""The names of modules and of their tensors: PEFT's keys, and the decoder layer in a module's name.

No knowledge of models is needed: in `model.layers.3.self_attn.q_proj`,
`transformer.h.3.attn.c_attn` and `transformer.layers.1.experts.7.w1` the layer is the first number
among the parts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

Factor = Literal["A", "B"]
FACTORS: tuple[Factor, Factor] = ("A", "B")

_PREFIX = "base_model.model."
_LORA_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_MAGNITUDE_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_magnitude_vector")
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save|original_module)$")
_LAYER = re.compile(r"((?:.*?\.)?[^.]+)\.(\d+)\.")
_DIGITS = re.compile(r"(\d+)")


def lora_name(module: str, factor: Factor) -> str:
    """Return PEFT's name of the tensor that is A or B of `module`."""
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def lora_parts(key: str) -> tuple[str, Factor] | None:
    """Return the module and factor of the tensor that PEFT calls `key`; None for other names."""
    match = _LORA_NAME.fullmatch(key)
    if match is None:
        return None
    return match["module"], "A" if match["factor"] == "A" else "B"


def magnitude_name(module: str) -> str:
    """Return PEFT's name of the tensor that is DoRA's magnitude of `module`."""
    return f"{_PREFIX}{module}.lora_magnitude_vector"


def magnitude_module(key: str) -> str | None:
    """Return the module of the magnitude that PEFT calls `key`; None for other names."""
    match = _MAGNITUDE_NAME.fullmatch(key)
    return match["module"] if match else None


def whole_name(key: str) -> str | None:
    """Return the base's name of the weight that the tensor `key` replaces; None for LoRA's own.

    PEFT saves the weight of a module that has LoRA too as that of its `base_layer`. Of embeddings
    that it saves for two reasons it writes, besides the weight itself, those of both its wrappers.
    """
    if not key.startswith(_PREFIX) or ".lora_" in key or "\n" in key:
        return None
    module, dot, last = key.removeprefix(_PREFIX).rpartition(".")
    return f"{_WRAPPER.sub('', module)}.{last}" if dot else None


def whole_key(weight: str, modules: Collection[str]) -> str:
    """Return PEFT's name of the tensor that replaces a base's weight, with LoRA on `modules`."""
    module, _, last = weight.rpartition(".")
    return f"{_PREFIX}{module}{'.base_layer' if module in modules else ''}.{last}"


def module_names(keys: Iterable[str]) -> list[str]:
    """Return the names of the modules that have a tensor in `keys`, by layer, then name."""
    modules = {parts[0] for key in keys if (parts := lora_parts(key))}
    return sorted(modules, key=natural_key)


def layer_of(module: str) -> int | None:
    """Return the index of the layer `module` is in, or None if its name has none.

    It is the first part of the name that is a number and has parts before and after it, as in
    PEFT's `layers_to_transform`; later numbers count experts or the parts of a sequence.
    """
    match = _LAYER.match(module)
    return int(match.group(2)) if match else None


def layer_list_of(module: str) -> str | None:
    """Return the name of the list of layers `module` is in (`model.layers`), or None."""
    match = _LAYER.match(module)
    return match.group(1) if match else None


def last_part(module: str) -> str:
    """Return the last part of a module's name: `q_proj` of `model.layers.3.self_attn.q_proj`."""
    return module.rsplit(".", 1)[-1]


def natural_key(module: str) -> tuple[int, int, list[tuple[int, str]]]:
    """Return a key that sorts modules by layer, then by name with its numbers as numbers."""
    layer = layer_of(module)
    parts = _DIGITS.split(module)
    words = [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
    return (layer is None, layer or 0, words)
