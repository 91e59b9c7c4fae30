"""What all prompts begin with: its tokens, and the keys and values that rows hold of them.

A Reader (reading.py) reads a prefix once, and its cache lets any rows begin with it; find-boundary
keeps one for each of its fans (boundary/decode.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
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

    @property
    def nbytes(self) -> int:
        """How many bytes the keys and values take."""
        return sum(part.nbytes for parts in self.layers.values() for part in parts)


class Prefixes:
    """Prefixes by what they were read for: those used last, as many as there is room for."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Prefix] = {}

    def get(self, key: Hashable, read: Callable[[], Prefix], room: int) -> Prefix:
        """Return a prefix, by reading it if it is not kept; all of them take up to `room` bytes.

        It is returned, and kept, even if it takes more alone.
        """
        prefix = self._kept.pop(key, None) or read()
        self._kept[key] = prefix
        taken = sum(kept.nbytes for kept in self._kept.values())
        for other in list(self._kept)[:-1]:
            if taken > room:
                taken -= self._kept.pop(other).nbytes
        return prefix


def shared_prefix(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the tokens that all prompts begin with, each having one more; none if few."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # what they share, all share
    differing = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    shared = min(next(differing, len(first)), min(map(len, prompts)) - 1)
    return first[:shared] if len(prompts) > 1 and shared >= _LEAST else ()
