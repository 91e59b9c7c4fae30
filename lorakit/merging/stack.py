"""Stack several adapters side by side as one, whose ΔW is exactly the sum of theirs.

Σ s_i·B_i·A_i is one adapter: A = [A_1; …; A_N] (rows stacked), B = [s_1·B_1, …, s_N·B_N] (columns
stacked), of rank Σ r_i and scale 1. The slice that came from adapter i is its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorakit.adapters.adapter import Adapter, Factors, LoraModule
from lorakit.adapters.blocks import Block, Slice, block_names
from lorakit.adapters.names import natural_key
from lorakit.adapters.tensors import FloatArray
from lorakit.adapters.whole import check_plain
from lorakit.errors import LorakitError


@dataclass(frozen=True)
class Stack:
    """Stacked adapters whose scales are not yet folded into B.

    `factors` holds, by module, A (Σ r_i × d_in) and B (d_out × Σ r_i) as they were loaded, float32.
    """

    factors: Factors
    blocks: tuple[Block, ...]

    @property
    def ranks(self) -> dict[str, int]:
        return {name: a.shape[0] for name, (a, _) in self.factors.items()}

    def scales(self, module: str) -> FloatArray:
        """Return the scale of every rank of a module, (Σ r_i,) float32."""
        scales = np.ones(self.ranks[module], np.float32)
        for block in self.blocks:
            if module in block.modules:
                scales[block.modules[module].span] = block.modules[module].scale
        return scales


def stack(adapters: Sequence[Adapter]) -> Stack:
    """Stack adapters of any ranks, scales, target modules and layers, in order.

    Raises LorakitError naming the module and both shapes if two adapters disagree on its widths,
    and for an adapter that holds more than A and B.
    """
    names = block_names(adapter.name for adapter in adapters)
    parts: dict[str, list[LoraModule]] = {}
    blocks = []
    for name, adapter in zip(names, adapters, strict=True):
        check_plain(adapter, "a merge that trains")
        slices = {}
        for module in adapter.modules():
            earlier = parts.setdefault(module.name, [])
            check_widths(earlier, module, adapter)
            offset = sum(part.rank for part in earlier)
            slices[module.name] = Slice(offset, module.rank, module.scale)
            earlier.append(module)
        blocks.append(Block(name, adapter.sha256, slices))
    factors = {
        name: (
            np.concatenate([part.a for part in parts[name]], axis=0),
            np.concatenate([part.b for part in parts[name]], axis=1),
        )
        for name in sorted(parts, key=natural_key)
    }
    return Stack(factors, tuple(blocks))


def check_widths(earlier: Sequence[LoraModule], module: LoraModule, adapter: Adapter) -> None:
    """Raise LorakitError if a module of `adapter` has other widths than in `earlier` adapters."""
    if not earlier:
        return
    first, shape = earlier[0].shape, module.shape
    if first != shape:
        raise LorakitError(
            f"{adapter.name}: {module.name} is {shape[0]}×{shape[1]}, in the adapters before it "
            f"{first[0]}×{first[1]}; merge only adapters of one base model"
        )


def fold(factors: Factors, stacked: Stack) -> Factors:
    """Return the stacked factors at scale 1: each block's scale is folded into its B."""
    return {name: (a, b * stacked.scales(name)) for name, (a, b) in factors.items()}
