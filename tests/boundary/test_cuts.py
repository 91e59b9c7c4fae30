"""Cuts: which layers keep how much of their LoRA at a point of the search."""

from __future__ import annotations

import itertools

import pytest

from lorakit.boundary.cuts import (
    BASE,
    Cut,
    Point,
    bottom,
    cut_at,
    layer_order,
    search_points,
)
from lorakit.errors import LorakitError
from lorakit.settings import BoundarySettings


@pytest.mark.parametrize(
    ("keep", "point", "factors"),
    [
        ("bottom", Point(3), (1, 1, 1, 0)),
        ("bottom", Point(2, 0.5), (1, 1, 0.5, 0.5)),
        ("bottom", Point(4, 0.5), (1, 1, 1, 1)),
        ("top", Point(3), (0, 1, 1, 1)),
        ("top", Point(1), (0, 0, 0, 1)),
        ("bottom", BASE, (0, 0, 0, 0)),
    ],
)
def test_the_worked_examples(keep: str, point: Point, factors: tuple[float, ...]) -> None:
    cut = cut_at(point, layer_order(keep, 4, seed=0))
    assert cut.factors == factors
    assert cut.left_in(None) == (0 if point == BASE else 1)


def test_random_layers_are_drawn_by_the_seed_and_each_boundary_adds_one() -> None:
    orders = [layer_order("random", 12, seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(12))
    kept = [{n for n, f in enumerate(cut_at(Point(k), orders[0]).factors) if f} for k in range(13)]
    for smaller, larger in itertools.pairwise(kept):
        assert smaller < larger
        assert len(larger) == len(smaller) + 1


@pytest.mark.parametrize("keep", ["bottom", "top", "random"])
def test_in_descending_order_a_cut_shares_no_more_with_a_later_one(keep: str) -> None:
    order = layer_order(keep, 6, seed=2)
    cuts = sorted((cut_at(Point(k), order).on(set(range(6))) for k in range(7)), reverse=True)
    for place, cut in enumerate(cuts):
        shared = [later.split_from(cut) for later in cuts[place + 1 :]]
        assert shared == sorted(shared, reverse=True)


def test_cuts_split_where_they_first_differ() -> None:
    assert bottom(1, 4).split_from(bottom(3, 4)) == 1
    assert bottom(3, 4).split_from(bottom(3, 4)) == 4
    assert bottom(0, 4).split_from(bottom(3, 4)) == 0
    head = Cut(0.0, bottom(3, 4).factors)
    assert head.split_from(bottom(3, 4)) == 0, "what is outside may lie below the layers"


def test_what_has_no_lora_makes_no_difference() -> None:
    assert bottom(2, 4).on({0, 3}) == bottom(1, 4).on({0, 3}) == Cut(0.0, (1.0, 0.0, 0.0, 0.0))
    assert bottom(2, 4).on({0, None}).outside == 1.0


def test_the_points_are_every_factor_at_every_boundary_after_the_base() -> None:
    assert search_points(BoundarySettings(), 3) == [BASE, Point(1), Point(2), Point(3)]
    soft = BoundarySettings(boundaries=(3, 2), factors=(0.5, 0.0))
    points = [BASE, Point(2), Point(2, 0.5), Point(3), Point(3, 0.5)]
    assert search_points(soft, 3) == points


def test_a_boundary_above_the_model_is_refused() -> None:
    with pytest.raises(LorakitError, match="no boundary 4; give boundaries within 1-3"):
        search_points(BoundarySettings(boundaries=(2, 4)), 3)
