"""Agreement of raters, against a published example and the formula written out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.judging.agreement import (
    interval_distance,
    krippendorff_alpha,
    nominal_distance,
    share_of_equal_pairs,
)

# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C: four observers rate
# twelve units, some are missing. He prints alpha 0.743 for nominal and 0.849 for interval data.
OBSERVERS = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
UNITS = [[int(value) for value in unit if value != "."] for unit in zip(*OBSERVERS, strict=True)]


def test_alpha_is_that_of_the_published_example() -> None:
    named = [[str(value) for value in unit] for unit in UNITS]
    assert krippendorff_alpha(named, nominal_distance) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(UNITS, interval_distance) == pytest.approx(0.849, abs=5e-4)


def test_alpha_of_two_raters_is_that_worked_out_by_hand() -> None:
    """Three units, (1, 1), (2, 3), (3, 3): n = 6.

    Observed: 2 · 1 / 6 = 1/3. Expected: values 1, 1, 2, 3, 3, 3 have ordered pairs at distance
    (2-1)² = 1: 2·2, (3-1)² = 4: 2·6, (3-2)² = 1: 2·3, in all 4 + 48 + 6 = 58, of 6 · 5 pairs.
    """
    units = [[1, 1], [2, 3], [3, 3]]
    assert krippendorff_alpha(units, interval_distance) == pytest.approx(1 - (1 / 3) / (58 / 30))
    assert share_of_equal_pairs(units) == pytest.approx(200 / 3)


def by_coincidences(units: list[list[int]], distance: Callable[[int, int], float]) -> float | None:
    """Return alpha by its coincidence matrix, the form in which Krippendorff computes it."""
    values = sorted({value for unit in units for value in unit})
    matrix = dict.fromkeys(((c, k) for c in values for k in values), 0.0)
    for unit in units:
        for c, k in permutations(unit, 2):
            matrix[c, k] += 1 / (len(unit) - 1)
    margin = {c: sum(matrix[c, k] for k in values) for c in values}
    n = sum(margin.values())
    observed = sum(matrix[c, k] * distance(c, k) for c, k in matrix) / n if n else 0
    expected = sum(margin[c] * margin[k] * distance(c, k) for c, k in matrix)
    return 1 - observed * n * (n - 1) / expected if expected else None


@given(st.lists(st.lists(st.integers(0, 10), max_size=4), max_size=6))
def test_alpha_is_that_of_the_coincidence_matrix(units: list[list[int]]) -> None:
    alpha = krippendorff_alpha(units, interval_distance)
    expected = by_coincidences(units, interval_distance)
    assert alpha == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("units", "alpha", "same"),
    [
        pytest.param([["a", "a"], ["b", "b"]], 1, 100, id="perfect agreement"),
        pytest.param([["a", "b"], ["b", "a"]], -0.5, 0, id="none: worse than chance"),
        pytest.param([["a", "a"], ["a", "a"]], None, 100, id="no variation"),
        pytest.param([["a"], ["b"]], None, None, id="one rater"),
        pytest.param([], None, None, id="nothing"),
    ],
)
def test_alpha_at_its_ends(units: list[list[str]], alpha: float | None, same: float | None) -> None:
    expected = None if alpha is None else pytest.approx(alpha)
    assert krippendorff_alpha(units, nominal_distance) == expected
    assert share_of_equal_pairs(units) == same
