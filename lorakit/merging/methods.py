"""Methods that merge adapters from their files alone, without data and without a base model.

Each takes the parts of one module, A_i and B_i of every adapter that changes it with a weight w_i
and a scale s_i, and returns one A (r × d_in) and one B (d_out × r) for it, float32, at scale 1. A
part's task vector is ΔW_i = s_i·B_i·A_i. Weights may be negative. To add a method: one function
and one line in METHODS. The algebra is in low_rank.py and task_vectors.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.settings import StaticSettings

if TYPE_CHECKING:
    from lorakit.merging.task_vectors import Combination, Pair, Part, Thinning

    Merge = Callable[[Sequence[Part], StaticSettings], Pair]


def cat(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return the factors side by side: exactly Σ w_i·ΔW_i, of rank Σ r_i."""
    from lorakit.merging.task_vectors import stacked

    return stacked(parts)


def linear(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return Σ w_i·ΔW_i exactly, at the lowest rank that float32 tells apart from it.

    It is the linear merge of the ΔW_i, zero-padded to one rank where theirs differ (which changes
    no ΔW). PEFT's `linear` sums A and B each on its own, which adds the cross terms B_i·A_j.
    """
    from lorakit.merging.low_rank import refit
    from lorakit.merging.task_vectors import stacked

    return refit(*stacked(parts))


def svd(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return the matrix of rank `settings.rank` nearest to Σ w_i·ΔW_i, without a dense ΔW."""
    from lorakit.merging.low_rank import refit
    from lorakit.merging.task_vectors import stacked

    return refit(*stacked(parts), settings.rank)


def magnitude_prune(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return Σ w_i·trim(ΔW_i), refitted: trim keeps the share `density` of largest |ΔW_i|."""
    from lorakit.merging.task_vectors import total, trimming

    return _dense(parts, settings, trimming(settings.density), total)


def ties(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return TIES' merge, refitted: trim each ΔW_i, elect signs, mean of those that agree.

    Weights multiply the trimmed task vectors, before the election (Yadav et al., 2023, have none):
    a negative one is a vote for the other sign, and a weight common to all scales the result, as
    the paper's λ does.
    """
    from lorakit.merging.task_vectors import elected, trimming

    return _dense(parts, settings, trimming(settings.density), elected)


def dare_linear(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return Σ w_i·drop(ΔW_i), refitted: drop keeps each parameter at chance `density`, rescaled.

    Yu et al. (2024), with their drop rate p = 1 − density and the rescaling by 1/density.
    """
    from lorakit.merging.task_vectors import dropping, total

    return _dense(parts, settings, dropping(settings.density, settings.seed), total)


def dare_ties(parts: Sequence[Part], settings: StaticSettings) -> Pair:
    """Return DARE's drop and rescale with the election and mean of TIES, refitted."""
    from lorakit.merging.task_vectors import dropping, elected

    return _dense(parts, settings, dropping(settings.density, settings.seed), elected)


def _dense(
    parts: Sequence[Part], settings: StaticSettings, thinning: Thinning, combine: Combination
) -> Pair:
    """Thin and combine the dense task vectors of one module and refit them to `settings.rank`.

    Where nothing is dropped and the combination is the plain sum, the factors are all it takes.
    """
    from lorakit.merging.low_rank import fit
    from lorakit.merging.task_vectors import combined, total

    if settings.density == 1 and (combine is total or len(parts) == 1):
        return svd(parts, settings)
    assert settings.rank is not None
    return fit(combined(parts, thinning, combine), settings.rank)


@dataclass(frozen=True)
class Method:
    """A way to merge without data: what it computes, the settings it reads, and a line of help."""

    merge: Merge
    settings: tuple[str, ...]
    help: str


METHODS: dict[str, Method] = {
    "cat": Method(cat, ("weights",), "the weighted sum, exact; ranks add up, blocks stay visible"),
    "linear": Method(linear, ("weights",), "the weighted sum, exact, at the lowest rank it has"),
    "svd": Method(svd, ("weights", "rank"), "the matrix of --rank nearest to the weighted sum"),
    "ties": Method(
        ties, ("weights", "density", "rank"), "trim to --density, elect signs, mean of the agreeing"
    ),
    "dare-linear": Method(
        dare_linear,
        ("weights", "density", "rank", "seed"),
        "drop at random to --density, rescale, sum",
    ),
    "dare-ties": Method(
        dare_ties,
        ("weights", "density", "rank", "seed"),
        "drop at random, rescale, elect signs as ties",
    ),
    "magnitude-prune": Method(
        magnitude_prune, ("weights", "density", "rank"), "keep the largest to --density, sum"
    ),
}
