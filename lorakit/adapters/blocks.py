"""Blocks: the parts of an adapter that came from one source adapter each.

An adapter that was merged side by side is a stack: a block is a run of rows of A, and the same
columns of B, in every module its source adapter had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from lorakit.adapters.adapter import Adapter, Factors


@dataclass(frozen=True)
class Slice:
    """Where a block lies in one module: rows offset … offset+rank of A, those columns of B."""

    offset: int
    rank: int
    scale: float

    @property
    def span(self) -> slice:
        return slice(self.offset, self.offset + self.rank)


@dataclass(frozen=True)
class Block:
    """The part of a stacked adapter that came from one source adapter, by module."""

    name: str
    sha256: str
    modules: Mapping[str, Slice]

    def header(self, zeros: float) -> dict[str, Any]:
        """Return the block's entry in the header; `zeros` is its share of zero parameters."""
        modules = {
            name: {"offset": part.offset, "rank": part.rank, "scale": part.scale}
            for name, part in self.modules.items()
        }
        return {"name": self.name, "sha256": self.sha256, "zeros": zeros, "modules": modules}


def block_names(adapters: Iterable[Adapter]) -> list[str]:
    """Return a name for each adapter, from its file's name; a second `xs` becomes `xs-2`."""
    return unique_names(plain_name(adapter) for adapter in adapters)


def plain_name(adapter: Adapter) -> str:
    """Return a short name of an adapter: its file's, or its folder's where all files are alike."""
    path = PurePath(adapter.name)
    plain = path.parent.name if path.stem in ("adapter_model", "adapter") else path.stem
    return plain or path.stem or "adapter"


def unique_names(plain_names: Iterable[str]) -> list[str]:
    """Return the names in order, a second and third `xs` as `xs-2` and `xs-3`."""
    names: list[str] = []
    for plain in plain_names:
        name, number = plain, 1
        while name in names:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def share_of_zeros(block: Block, factors: Factors) -> float:
    """Return the share of a block's parameters, A and B together, that are exactly zero."""
    zeros = count = 0
    for name, part in block.modules.items():
        a, b = factors[name][0][part.span], factors[name][1][:, part.span]
        zeros += a.size + b.size - int(np.count_nonzero(a)) - int(np.count_nonzero(b))
        count += a.size + b.size
    return zeros / count
