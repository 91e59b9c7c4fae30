"""Merging algebra: adapters side by side as one, exact in ΔW.

Σ s_i·B_i·A_i is one adapter: A = [A_1; …; A_N] (rows stacked), B = [s_1·B_1, …, s_N·B_N] (columns
stacked), of rank Σ r_i and scale 1. The slice that came from adapter i is its block; the table of
blocks stays in the header.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.adapters.adapter import Adapter, LoraModule, lora_name
from lorakit.adapters.names import layer_of, natural_key
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError

FloatArray = NDArray[np.float32]
Factors = Mapping[
    str, tuple[FloatArray, FloatArray]
]  # A (rank, d_in) and B (d_out, rank) by module


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


@dataclass(frozen=True)
class Stack:
    """Adapters stacked, their scales not yet folded into B.

    `factors` holds, by module, A (Σ r_i, d_in) and B (d_out, Σ r_i) as they were loaded, float32.
    """

    factors: Factors
    blocks: tuple[Block, ...]

    @property
    def ranks(self) -> dict[str, int]:
        return {name: a.shape[0] for name, (a, _) in self.factors.items()}

    def scales(self, module: str) -> FloatArray:
        """Return the scale of each rank of a module, (Σ r_i,) float32."""
        scales = np.ones(self.ranks[module], np.float32)
        for block in self.blocks:
            if module in block.modules:
                scales[block.modules[module].span] = block.modules[module].scale
        return scales


def stack(adapters: Sequence[Adapter]) -> Stack:
    """Stack adapters of any ranks, scales, targets and layers, in the order given.

    Raises LorakitError naming the module and both shapes where two adapters disagree on its widths.
    """
    names = block_names(adapters)
    parts: dict[str, list[LoraModule]] = {}
    blocks = []
    for name, adapter in zip(names, adapters, strict=True):
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
    """Raise LorakitError where `adapter`'s module has other widths than the same one before it."""
    if not earlier:
        return
    first, shape = earlier[0].shape, module.shape
    if first != shape:
        raise LorakitError(
            f"{adapter.name}: {module.name} is {shape[0]}×{shape[1]}, in the adapters before it "
            f"{first[0]}×{first[1]}; merge only adapters of one base model"
        )


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


def tensors_of(factors: Factors) -> dict[str, Tensor]:
    """Return the factors as the float32 tensors of an adapter, by PEFT's names."""
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[lora_name(name, "A")] = Tensor.from_array(a)
        tensors[lora_name(name, "B")] = Tensor.from_array(b)
    return tensors


def fold(factors: Factors, stacked: Stack) -> Factors:
    """Return the factors of the same adapter at scale 1: each block's scale goes into its B."""
    return {name: (a, b * stacked.scales(name)) for name, (a, b) in factors.items()}


def share_of_zeros(block: Block, factors: Factors) -> float:
    """Return the share of a block's parameters, A and B together, that are exactly zero."""
    zeros = count = 0
    for name, part in block.modules.items():
        a, b = factors[name][0][part.span], factors[name][1][:, part.span]
        zeros += a.size + b.size - int(np.count_nonzero(a)) - int(np.count_nonzero(b))
        count += a.size + b.size
    return zeros / count


def peft_config(
    ranks: Mapping[str, int],
    *,
    base: str | None,
    dropout: float = 0.0,
    alpha: float | None = None,
    transposed: bool = False,
    there: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the config under which PEFT builds exactly these modules, with these ranks.

    The scale is alpha/rank where one alpha is given, else 1. `there` are all projections of the
    base: where naming the modules by their last part selects no other, that short form is used.
    """
    modules = sorted(ranks, key=natural_key)
    most = max(set(ranks.values()), key=lambda rank: (list(ranks.values()).count(rank), rank))
    other = {name: ranks[name] for name in modules if ranks[name] != most}
    targets, layers = short_targets(modules, there)
    return {
        "alpha_pattern": dict(other) if alpha is None else {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": layers,
        "lora_alpha": most if alpha is None else alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": most,
        "rank_pattern": other,
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }


def short_targets(
    modules: Sequence[str], there: Iterable[str]
) -> tuple[list[str], list[int] | None]:
    """Return PEFT's target_modules and layers_to_transform that select exactly `modules`.

    Last parts of names (and the layers, where not all of them are meant) if they select no other
    projection of `there`; else the full names.
    """
    there = list(there)
    lasts = sorted({name.rsplit(".", 1)[-1] for name in modules})
    named = {name for name in there if name.rsplit(".", 1)[-1] in lasts}
    if named == set(modules):
        return lasts, None
    layers = sorted({layer for name in modules if (layer := layer_of(name)) is not None})
    if {name for name in named if layer_of(name) in layers} == set(modules):
        return lasts, layers
    return list(modules), None
