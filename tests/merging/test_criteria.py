from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.merging.criteria import (
    BETA,
    CRITERIA,
    VALUES,
    Evidence,
    least_important,
    mean_importance,
    prune_count,
    smooth_,
)

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
    torch.testing.assert_close(
        CRITERIA[criterion].score(WEIGHT, Evidence(NORMS)), torch.tensor(importance)
    )


def test_the_least_important_become_zero_and_no_other() -> None:
    weight = WEIGHT.clone()
    weight[least_important(CRITERIA["input"].score(weight, Evidence(NORMS)), 3)] = 0
    assert weight.tolist() == [[1.0, 0.0, 0.5], [-2.0, 0.0, 0.0]]


def test_ties_do_not_zero_more_than_the_share() -> None:
    assert int(least_important(torch.ones(4, 5), 7).sum()) == 7


def test_groups_of_one_shape_chosen_together_equal_groups_chosen_alone() -> None:
    torch.manual_seed(0)
    importance = torch.rand(3, 4, 5)
    alone = torch.stack([least_important(group, 6) for group in importance])
    assert torch.equal(least_important(importance, 6), alone)


def test_the_gradient_score_is_that_of_platon_over_two_steps() -> None:
    """By hand: I = |w·g| = 2, then 4; averages with 0.85; score = Ī·U."""
    weight, sensitivity, uncertainty = torch.tensor([[2.0]]), torch.zeros(1, 1), torch.zeros(1, 1)
    smooth_(sensitivity, uncertainty, weight, torch.tensor([[-1.0]]))
    assert sensitivity.item() == pytest.approx(0.15 * 2)
    assert uncertainty.item() == pytest.approx(0.15 * (2 - 0.3))
    smooth_(sensitivity, uncertainty, weight, torch.tensor([[2.0]]))
    mean = 0.85 * 0.3 + 0.15 * 4
    spread = 0.85 * 0.15 * 1.7 + 0.15 * (4 - mean)
    assert sensitivity.item() == pytest.approx(mean)
    assert uncertainty.item() == pytest.approx(spread)
    score = CRITERIA["gradient"].score(weight, Evidence(averages=(sensitivity, uncertainty)))
    assert score.item() == pytest.approx(mean * spread)
    assert BETA == 0.85


def test_the_mean_importance_of_a_pair_is_over_all_parameters_of_both() -> None:
    of_a, of_b = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[10.0], [20.0]]])
    assert mean_importance(of_a, of_b).tolist() == pytest.approx([36 / 5])


@pytest.mark.parametrize("is_b", [False, True], ids=["A", "B"])
@pytest.mark.parametrize("value", list(VALUES))
def test_what_is_reset_takes_the_value_asked_for(value: str, is_b: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    weight, start = torch.ones(2, 50, 4), torch.full((2, 50, 4), 7.0)
    found = VALUES[value].of(weight, start, is_b, draws)
    if value == "init":
        assert torch.equal(found, start)
    elif value == "zero" or is_b:
        assert torch.equal(found, torch.zeros(2, 50, 4))
    else:  # Kaiming uniform with a = √5 over d_in = 4, as PEFT and torch.nn.Linear start
        peer = torch.empty(5000, 4)
        torch.nn.init.kaiming_uniform_(peer, a=5**0.5)
        assert float(found.abs().max()) <= 0.5
        assert float(found.std()) == pytest.approx(float(peer.std()), rel=0.1)
        assert len(found.unique()) > 390


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
    mask = least_important(torch.tensor([importance]), count)[0].tolist()
    pruned = [i for i, chosen in zip(importance, mask, strict=True) if chosen]
    kept = [i for i, chosen in zip(importance, mask, strict=True) if not chosen]
    assert len(pruned) == count
    assert max(pruned, default=0.0) <= min(kept, default=2.0)
