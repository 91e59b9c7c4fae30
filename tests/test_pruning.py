from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.pruning import CRITERIA, prune_, prune_count

WEIGHT = torch.tensor([[1.0, -4.0, 0.5], [-2.0, 3.0, 0.0]])
NORMS = torch.tensor([10.0, 0.1, 1.0])


@pytest.mark.parametrize(
    ("criterion", "importance"),
    [
        ("input", [[10.0, 0.4, 0.5], [20.0, 0.3, 0.0]]),
        ("magnitude", [[1.0, 4.0, 0.5], [2.0, 3.0, 0.0]]),
    ],
)
def test_importance_is_what_the_formula_says(criterion: str, importance: list[list[float]]) -> None:
    torch.testing.assert_close(CRITERIA[criterion](WEIGHT, NORMS), torch.tensor(importance))


def test_the_least_important_become_zero_and_no_other() -> None:
    weight = WEIGHT.clone()
    prune_(weight, CRITERIA["input"](weight, NORMS), 3)
    assert weight.tolist() == [[1.0, 0.0, 0.5], [-2.0, 0.0, 0.0]]


def test_ties_do_not_zero_more_than_the_share() -> None:
    weight = torch.ones(4, 5)
    prune_(weight, weight.abs(), 7)
    assert int((weight == 0).sum()) == 7


def test_a_slice_of_columns_is_pruned_in_place() -> None:
    whole = torch.arange(1.0, 13.0).reshape(3, 4)
    part = whole[:, 1:3]
    prune_(part, part.abs(), 2)
    assert whole.tolist() == [[1, 0, 0, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def test_groups_of_one_shape_pruned_together_equal_groups_pruned_alone() -> None:
    torch.manual_seed(0)
    together = torch.randn(3, 4, 5)
    alone = together.clone()
    prune_(together, together.abs(), 6)
    for group in alone:
        prune_(group, group.abs(), 6)
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("ratio", "size", "count"),
    [
        ("0.29", 100, 29),
        ("0.7", 10, 7),
        ("0.57", 100, 57),
        ("0", 9, 0),
        ("0.1", 9, 0),
        ("0.9", 11, 9),
    ],
)
def test_the_count_is_the_floor_of_the_decimal_as_written(
    ratio: str, size: int, count: int
) -> None:
    assert prune_count(Decimal(ratio), size) == count


@given(st.decimals(0, 1, places=3).filter(lambda ratio: ratio < 1), st.integers(1, 10**7))
def test_the_count_equals_exact_arithmetic(ratio: Decimal, size: int) -> None:
    assert prune_count(ratio, size) == int(Fraction(ratio) * size)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30), st.data())
def test_exactly_the_count_is_chosen_and_it_is_the_least(
    importance: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(importance)))
    weight = torch.ones(1, len(importance))
    prune_(weight, torch.tensor([importance]), count)
    pruned = [i for i, w in zip(importance, weight[0].tolist(), strict=True) if w == 0]
    kept = [i for i, w in zip(importance, weight[0].tolist(), strict=True) if w != 0]
    assert len(pruned) == count
    assert max(pruned, default=0.0) <= min(kept, default=2.0)
