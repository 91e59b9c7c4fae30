"""What all prompts begin with: its tokens, and the keys and values that rows hold of them.

A Reader (reading.py) reads a prefix once, and its cache lets rows begin with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

_LEAST = 8  # tokens that all prompts begin with, which are worth a pass of their own
KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class Prefix(NamedTuple):
    """What rows hold of the tokens that they begin with: keys and values, by layer.

    They are (rows, tokens, heads, width); rows that split off above a layer have none in it.
    """

    tokens: int
    layers: Mapping[int, KeysAndValues]


def shared_prefix(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the tokens that all prompts begin with, each having one more; none if few."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # what they share, all share
    differing = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    shared = min(next(differing, len(first)), min(map(len, prompts)) - 1)
    return first[:shared] if len(prompts) > 1 and shared >= _LEAST else ()
