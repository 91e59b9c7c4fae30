"""Task vectors of one module: what each adapter adds to its weights, and ways to combine them.

A part is one adapter's A/B pair at the module with its weight; its task vector is w·s·B·A. Stacked
factors give sums of task vectors exactly. Methods that look at single parameters (TIES, DARE,
magnitude) need dense task vectors, which are formed for a few rows of one module at a time. Which
method does what is in module_merges.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

import numpy as np

from lorakit.adapters.adapter import LoraModule
from lorakit.adapters.tensors import FloatArray, Pair, Tensor
from lorakit.merging.low_rank import Matrix, numerical_rank, product_svd

_BLOCK = 1 << 20  # parameters of a task vector that are formed at a time


@dataclass(frozen=True)
class Part:
    """One adapter's A/B pair at a module, its weight, and the adapter's index."""

    module: LoraModule
    weight: float
    adapter: int

    @property
    def factor(self) -> float:
        """w·s: the task vector is B·A times this."""
        return self.weight * self.module.scale


# Takes the next rows of a part's ΔW; sets what is dropped to zero and rescales the rest, in place.
Thin = Callable[[FloatArray], None]
# Returns a Thin for one part, which is to be given the rows in order.
Thinning = Callable[[Part], Thin]
# Combines the weighted and thinned task vectors of all parts, parameter by parameter.
Combination = Callable[[Sequence[FloatArray]], FloatArray]


def stack_parts(parts: Sequence[Part]) -> Pair:
    """Return A = [A_1; …; A_N] and B = [w_1·s_1·B_1, …]: B·A is the sum of the task vectors."""
    a = np.concatenate([part.module.a for part in parts], axis=0)
    b = np.concatenate([part.module.b * np.float32(part.factor) for part in parts], axis=1)
    return a, b


def in_basis(part: Part, basis: Matrix) -> Part:
    """Return the part whose ΔW is Uᵀ·ΔW: its coordinates in an orthonormal basis U (d_out × R)."""
    b = Tensor.from_array(basis.T @ part.module.b.astype(np.float64))
    return replace(part, module=replace(part.module, tensor_b=b))


def leading_components(
    part: Part, count: int, density: Decimal
) -> tuple[Matrix, Matrix, Matrix] | None:
    """Return the largest singular components of a part's task vector w·ΔW; None if it is zero.

    They are U (d_out × k), w·s·σ (k,), negative where w is, and V (d_in × k). Kept are the share
    `density` of those nonzero ones that are among the floor(min(d_out, d_in) / count) largest, but
    at least one.
    """
    svd = product_svd(part.module.a, part.module.b)
    if not svd.values[0]:
        return None
    most = min(numerical_rank(svd.values), min(part.module.shape) // count)
    k = max(1, int(density * most))
    return svd.left(k), np.float32(part.factor) * svd.values[:k], svd.right(k).T


def combine_parts(parts: Sequence[Part], thinning: Thinning, combine: Combination) -> FloatArray:
    """Return the combination of the thinned task vectors of one module: d_out × d_in, float32.

    Besides the result, memory holds a few rows of each part and what `thinning` needs.
    """
    merged = np.empty(parts[0].module.shape, np.float32)
    thin_by_part = [thinning(part) for part in parts]
    blocks = [row_blocks(part) for part in parts]
    first = 0
    for rows in zip(*blocks, strict=True):
        for thin, values in zip(thin_by_part, rows, strict=True):
            thin(values)
        weighted = [
            values * np.float32(part.weight) for values, part in zip(rows, parts, strict=True)
        ]
        merged[first : first + len(rows[0])] = combine(weighted)
        first += len(rows[0])
    return merged


def row_blocks(part: Part) -> Iterator[FloatArray]:
    """Yield ΔW = s·B·A of a part, without its weight, in runs of rows, float32."""
    a = part.module.a
    b: FloatArray = part.module.b * np.float32(part.module.scale)
    count = max(1, _BLOCK // a.shape[1])
    for first in range(0, len(b), count):
        yield b[first : first + count] @ a


def total(task_vectors: Sequence[FloatArray]) -> FloatArray:
    """Return the sum of the task vectors."""
    return sum(task_vectors[1:], start=task_vectors[0])


def elected_mean(task_vectors: Sequence[FloatArray]) -> FloatArray:
    """Return, for each parameter, the mean of the values that have the elected sign.

    The elected sign is that of the sum; the mean is over the nonzero values that have it (TIES,
    Yadav et al., 2023, section 3, steps 2 and 3). If the sum is zero no sign is elected and the
    result is zero.
    """
    sign = np.sign(total(task_vectors))
    agreeing = [np.where(np.sign(values) == sign, values, np.float32(0)) for values in task_vectors]
    count = np.count_nonzero(agreeing, axis=0)
    return np.asarray(total(agreeing) / np.maximum(count, 1), np.float32)


def trimming(density: Decimal) -> Thinning:
    """Keep the floor(density·n) largest of the n parameters of each module by |ΔW| (TIES, step 1).

    The rest become zero. Of equals the first are kept, so that the number kept is exact.
    """

    def begin(part: Part) -> Thin:
        least, spare = _threshold(part, int(density * part.module.shape[0] * part.module.shape[1]))

        def thin(values: FloatArray) -> None:
            nonlocal spare
            size = np.abs(values)
            equal = np.flatnonzero(size == least)
            values[size < least] = 0
            values.reshape(-1)[equal[spare:]] = 0
            spare -= min(spare, len(equal))

        return thin

    return begin


def _threshold(part: Part, count: int) -> tuple[float, int]:
    """Return the `count`-th largest |ΔW| of a part, and how many of exactly that size to keep."""
    if count == 0:
        return float("inf"), 0
    size = np.empty(part.module.shape[0] * part.module.shape[1], np.float32)
    first = 0
    for values in row_blocks(part):
        size[first : first + values.size] = np.abs(values).reshape(-1)
        first += values.size
    size.partition(len(size) - count)
    largest = size[-count:]
    return float(largest[0]), int(np.count_nonzero(largest == largest[0]))


def dropping(density: Decimal, seed: int) -> Thinning:
    """Keep each parameter of ΔW with probability `density` and divide it by that.

    DARE (Yu et al., 2024). The draws depend on the seed, the module's name and the adapter's index.
    """
    share = np.float32(density)

    def begin(part: Part) -> Thin:
        name = f"dare:{seed}:{part.adapter}:{part.module.name}"
        draw = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()))

        def thin(values: FloatArray) -> None:
            values *= (draw.random(values.shape, np.float32) < share) / share

        return thin

    return begin
