"""Which decoder layer a module belongs to, told from its name alone.

It knows no model: `model.layers.3.self_attn.q_proj`, `transformer.h.3.attn.c_attn` and
`transformer.layers.1.experts.7.w1` all name their layer by the first number among their parts.
"""

from __future__ import annotations

import re

_LAYER = re.compile(r"((?:.*?\.)?[^.]+)\.(\d+)\.")
_DIGITS = re.compile(r"(\d+)")


def layer_of(module: str) -> int | None:
    """Return the index of the layer `module` is in, or None where its name holds none.

    It is the first part of the name that is a number with parts before and after it, as PEFT reads
    names for `layers_to_transform`; a later number counts experts or the parts of a sequence.
    """
    match = _LAYER.match(module)
    return int(match.group(2)) if match else None


def stack_of(module: str) -> str | None:
    """Return the name of the list of layers `module` is in (`model.layers`), or None."""
    match = _LAYER.match(module)
    return match.group(1) if match else None


def natural_key(module: str) -> tuple[int, int, list[tuple[int, str]]]:
    """Return a key that sorts modules by layer, then by name with its numbers in number order."""
    layer = layer_of(module)
    parts = _DIGITS.split(module)
    words = [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
    return (layer is None, layer or 0, words)
