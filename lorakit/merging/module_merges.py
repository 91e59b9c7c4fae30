"""How each method without data merges one module; the table of methods is in methods.py.

A function here takes the parts of one module, which are A_i and B_i of every adapter that changes
it, with a weight w_i and a scale s_i, and returns one A (r × d_in) and one B (d_out × r), float32,
at scale 1.
A part's task vector is ΔW_i = s_i·B_i·A_i. The algebra is in low_rank.py and task_vectors.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorakit.adapters.tensors import Pair
from lorakit.merging.low_rank import common_basis, fit, polar_factor, refit
from lorakit.merging.task_vectors import (
    Combination,
    Part,
    Thinning,
    combine_parts,
    dropping,
    elected_mean,
    in_basis,
    leading_components,
    stack_parts,
    total,
    trimming,
)
from lorakit.settings import StaticSettings


def cat(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return the factors side by side: exactly Σ w_i·ΔW_i, of rank Σ r_i."""
    return stack_parts(parts)


def linear(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return Σ w_i·ΔW_i exactly, at the lowest rank that float32 cannot tell from it.

    The ΔW_i are summed, whatever their ranks. PEFT's `linear` sums A and B separately, which adds
    the cross terms B_i·A_j.
    """
    return refit(*stack_parts(parts))


def svd(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return the matrix of rank `settings.rank` nearest to Σ w_i·ΔW_i, without a dense ΔW.

    With `settings.keep_energy`, its rank is the lowest that keeps that share of ‖Σ w_i·ΔW_i‖², up
    to `settings.max_rank`.
    """
    a, b = stack_parts(parts)
    if settings.keep_energy is None:
        return refit(a, b, settings.rank)
    return refit(a, b, settings.max_rank, energy=settings.keep_energy)


def magnitude_prune(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return Σ w_i·trim(ΔW_i), refitted: trim keeps the share `density` of largest |ΔW_i|."""
    return _dense(parts, settings, trimming(settings.density), total)


def ties(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return the merge by TIES, refitted: trim each ΔW_i, elect signs, average what agrees.

    Weights, which Yadav et al. (2023) do not have, multiply the trimmed task vectors before the
    election: a negative one is a vote for the other sign, and a weight common to all scales the
    result, as the paper's λ does.
    """
    return _dense(parts, settings, trimming(settings.density), elected_mean)


def dare_linear(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return Σ w_i·drop(ΔW_i), refitted: drop keeps a parameter with probability `density`.

    As in DARE (Yu et al., 2024): the drop rate is p = 1 − density, and the rest is divided by
    density.
    """
    return _dense(parts, settings, dropping(settings.density, settings.seed), total)


def dare_ties(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return DARE's drop and rescale with the election and mean of TIES, refitted."""
    return _dense(parts, settings, dropping(settings.density, settings.seed), elected_mean)


def knots(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return the merge by KnOTS with TIES (Stoica et al., 2025), refitted.

    [w_1·ΔW_1 | … | w_N·ΔW_N] = U·Σ·[V_1ᵀ | … | V_Nᵀ], so that all w_i·ΔW_i = U·(Σ·V_iᵀ) have one
    basis. TIES trims, elects and averages the Σ·V_iᵀ, (R × d_in) with R ≤ Σ r_i, which are Uᵀ times
    the task vectors; U times the outcome is the merge, and no d_out × d_in matrix is formed.
    Without trimming Σ inside or outside makes no difference; the published code trims Σ·V_iᵀ. What
    it does otherwise: it trims over all modules at once, gives a parameter without an elected sign
    the majority's, has one weight for all, and merges full-rank matrices.
    """
    basis = common_basis([(p.module.a, p.module.b * np.float32(p.factor)) for p in parts])
    aligned = [in_basis(part, basis) for part in parts]
    merged = combine_parts(aligned, trimming(settings.density), elected_mean)
    return refit(merged, basis, _rank(parts, settings))


def tsv(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return the merge by task singular vectors, TSV-M (Gargiulo et al., 2025), refitted.

    Of each ΔW_i = U_i·Σ_i·V_iᵀ the floor(min(d_out, d_in) / N) largest components are kept, with N
    the number of adapters at the module; of these, the share `density`, but at least one. Then
    [U_1 … U_N] and [V_1 … V_N] become their polar factors, and the result is Ũ·diag(w_i·Σ_i)·Ṽᵀ.
    The published code takes components with singular value 0, whose vectors are arbitrary, into the
    polar factors, and completes deficient ones by arbitrary vectors; here both are left out. It has
    one weight for all.
    """
    leading = (leading_components(part, len(parts), settings.density) for part in parts)
    components = [component for component in leading if component is not None]
    if not components:
        return svd(parts, settings)
    left = polar_factor(np.concatenate([u for u, _, _ in components], axis=1))
    right = polar_factor(np.concatenate([v for _, _, v in components], axis=1))
    values = np.concatenate([values for _, values, _ in components])
    return refit(values[:, None] * right.T, left, _rank(parts, settings))


def _rank(parts: Sequence[Part], settings: StaticSettings) -> int:
    """Return the rank to refit to: the one that is set, else the parts' largest."""
    return settings.rank or max(part.module.rank for part in parts)


def _dense(
    parts: Sequence[Part], settings: StaticSettings, thinning: Thinning, combine: Combination
) -> Pair:
    """Thin and combine the dense task vectors of one module; fit factors of the requested rank.

    If nothing is dropped and the combination is the plain sum, no dense matrix is needed.
    """
    if settings.density == 1 and (combine is total or len(parts) == 1):
        return svd(parts, settings)
    return fit(combine_parts(parts, thinning, combine), _rank(parts, settings))
