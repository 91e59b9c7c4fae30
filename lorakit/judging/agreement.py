"""How far raters agree: Krippendorff's alpha, and the share of pairs of equal ratings.

A unit is what was rated; it holds one value for each rater who rated it. This file knows neither
sheets nor records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from typing import TypeVar

V = TypeVar("V", bound=Hashable)


def interval_distance(value: float, other: float) -> float:
    """Return the squared difference: for ratings, where 4 is nearer to 5 than to 9."""
    return (value - other) ** 2


def nominal_distance(value: str, other: str) -> float:
    """Return 1 where two values differ, else 0: for choices, none nearer to one than to another."""
    return float(value != other)


def krippendorff_alpha(
    units: Sequence[Sequence[V]], distance: Callable[[V, V], float]
) -> float | None:
    """Return alpha, 1 − D_o / D_e: 1 is perfect agreement, 0 what chance alone gives.

    D_o is the mean distance of two raters' values for the same unit, D_e that of any two values.
    Units with fewer than two values count for neither. None where nothing can be said: no unit has
    two values, or all values are the same. Source: Krippendorff, Computing Krippendorff's
    Alpha-Reliability (2011).
    """
    rated = [unit for unit in units if len(unit) > 1]
    times = Counter(value for unit in rated for value in unit)
    total = times.total()
    observed = sum(_distances(unit, distance) / (len(unit) - 1) for unit in rated)
    expected = sum(
        times[value] * times[other] * distance(value, other)
        for value, other in combinations(times, 2)
    )
    if not expected:
        return None
    return 1 - observed * (total - 1) / expected


def _distances(unit: Sequence[V], distance: Callable[[V, V], float]) -> float:
    """Return the sum of the distances of all pairs of a unit's values."""
    return sum(distance(value, other) for value, other in combinations(unit, 2))


def share_of_equal_pairs(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Return the percentage of pairs of values for the same unit that are equal; None for none."""
    pairs = [value == other for unit in units for value, other in combinations(unit, 2)]
    return 100 * sum(pairs) / len(pairs) if pairs else None
