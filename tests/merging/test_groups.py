"""Groups: exactly floor(ratio·n) of each are chosen, ties or not, and they are the least.

Every group is held to a naive loop over a training run in test_pruner.py.
"""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.merging.groups import GROUPS, Scores, least_pairs, pairs_below

RANK, D_IN, D_OUT = 2, 5, 3


def stacks(values: list[float], factors: list[float]) -> list[Scores]:
    """Return three pairs of two adapters in two shapes, filled with the values over and over."""
    made, numbers = [], iter(range(10**6))

    def filled(*shape: int) -> torch.Tensor:
        flat = [values[next(numbers) % len(values)] for _ in range(torch.Size(shape).numel())]
        return torch.tensor(flat).view(shape)

    for adapters, rank in (([0, 1], RANK), ([1], RANK + 1)):
        made.append(
            Scores(
                filled(len(adapters), rank, D_IN),
                filled(len(adapters), D_OUT, rank),
                torch.tensor([factors[number] for number in adapters]),
                torch.tensor(adapters),
            )
        )
    return made


SIZES = {  # of the groups, which must sum up to all parameters
    "matrix": [10, 6, 10, 6, 15, 9],
    "pair": [16, 16, 24],
    "row": [5] * 7 + [2] * 6 + [3] * 3,
    "adapter": [16, 40],
    "all": [56],
}


@pytest.mark.parametrize("group", GROUPS)
@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30),
    ratio=st.decimals("0", "0.99", places=2),
)
def test_exactly_the_floor_of_the_share_is_chosen_ties_or_not(
    group: str, values: list[float], ratio: Decimal
) -> None:
    assert sum(SIZES[group]) == 56
    masks = GROUPS[group].choose(stacks(values, [1.0, 1.0]), ratio)
    assert sum(int(mask.sum()) for pair in masks for mask in pair) == sum(
        int(ratio * size) for size in SIZES[group]
    )


def test_a_row_of_b_has_as_many_parameters_as_the_rank() -> None:
    """So that a share below one over the rank resets nothing in B, as in Wanda."""
    ((of_a, of_b), _) = GROUPS["row"].choose(stacks([1.0], [1.0, 1.0]), Decimal("0.4"))
    assert of_a.sum(-1).tolist() == [[2, 2], [2, 2]]
    assert not of_b.any()


@pytest.mark.parametrize(("group", "chosen"), [("adapter", [6, 16]), ("all", [0, 22])], ids=str)
def test_scales_count_where_adapters_are_compared(group: str, chosen: list[int]) -> None:
    """Ten times the scale saves an adapter's parameters from all, but not from its own group."""
    made = stacks([1.0, 2.0, 3.0, 4.0], [10.0, 1.0])
    counts = [0, 0]
    for (of_a, of_b), scores in zip(GROUPS[group].choose(made, Decimal("0.4")), made, strict=True):
        for index, adapter in enumerate(scores.adapters.tolist()):
            counts[adapter] += int(of_a[index].sum() + of_b[index].sum())
    assert counts == chosen


@pytest.mark.parametrize(
    ("ratio", "by_adapter", "chosen"),
    [
        ("0.28", False, []),
        ("0.29", False, [1]),
        ("0.56", False, [1]),
        ("0.58", False, [1, 0]),
        ("0.99", False, [1, 0]),
        ("0.58", True, [1]),
        ("0.39", True, []),
    ],
)
def test_whole_pairs_go_in_order_of_their_means_as_far_as_the_share(
    ratio: str, by_adapter: bool, chosen: list[int]
) -> None:
    """Pairs of 16, 16 and 24 parameters, of adapters 0, 1 and 1; means 2, 1 and 3."""
    means = [2.0, 1.0, 3.0]
    made = [
        scores._replace(
            of_a=torch.ones_like(scores.of_a),
            of_b=torch.ones_like(scores.of_b),
            factors=torch.tensor(factors),
        )
        for scores, factors in zip(stacks([1.0], [1.0, 1.0]), (means[:2], means[2:]), strict=True)
    ]
    masks = least_pairs(made, Decimal(ratio), by_adapter=by_adapter)
    whole = [of_a[i].all() and of_b[i].all() for of_a, of_b in masks for i in range(len(of_a))]
    any_of = [of_a[i].any() or of_b[i].any() for of_a, of_b in masks for i in range(len(of_a))]
    assert whole == any_of
    assert {number for number in range(3) if whole[number]} == set(chosen)


def test_pairs_below_a_threshold_are_chosen_whole() -> None:
    made = stacks([1.0], [2.0, 1.0])
    masks = pairs_below(made, Decimal("1.5"))
    assert [bool(of_a[i].all()) for of_a, _ in masks for i in range(len(of_a))] == [
        False,
        True,
        True,
    ]
    assert not any(mask.any() for pair in pairs_below(made, Decimal(1)) for mask in pair)
