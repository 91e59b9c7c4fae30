"""How each method without data merges one module; the table of methods is in methods.py.

A function here takes the parts of one module, which are A_i and B_i of every adapter that changes
it, with a weight w_i and a scale s_i, and returns one A (r × d_in) and one B (d_out × r), float32,
at scale 1.
A part's task vector is ΔW_i = s_i·B_i·A_i. The algebra is in low_rank.py and task_vectors.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.adapters.tensors import Pair
from lorakit.merging.low_rank import fit, refit
from lorakit.merging.task_vectors import (
    Combination,
    Part,
    Thinning,
    combine_parts,
    dropping,
    elected_mean,
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
    """Return the matrix of rank `settings.rank` nearest to Σ w_i·ΔW_i, without a dense ΔW."""
    return refit(*stack_parts(parts), settings.rank)


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


def _dense(
    parts: Sequence[Part], settings: StaticSettings, thinning: Thinning, combine: Combination
) -> Pair:
    """Thin and combine the dense task vectors of one module; fit factors of the requested rank.

    If nothing is dropped and the combination is the plain sum, no dense matrix is needed.
    """
    if settings.density == 1 and (combine is total or len(parts) == 1):
        return svd(parts, settings)
    rank = settings.rank or max(part.module.rank for part in parts)
    return fit(combine_parts(parts, thinning, combine), rank)
