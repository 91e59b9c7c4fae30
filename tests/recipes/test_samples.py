"""Samples: the draw is the same everywhere, and fair."""

from __future__ import annotations

import itertools

import pytest

from lorakit.recipes.samples import draw
from lorakit.records import Record

ROWS = [Record({"id": str(number)}, f"x:{number}") for number in range(100)]


@pytest.mark.parametrize(
    ("seed", "drawn"),
    [(0, ["15", "44", "46", "87", "99"]), (1, ["30", "39", "71", "72", "90"])],
)
def test_a_draw_is_the_same_on_every_machine(seed: int, drawn: list[str]) -> None:
    assert [row.id for row in draw(iter(ROWS), 5, seed)] == drawn


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_draw_holds_the_smaller_and_keeps_the_order(seed: int) -> None:
    draws = [[int(row.id) for row in draw(ROWS, count, seed)] for count in (0, 1, 10, 50, 100, 200)]
    assert [len(drawn) for drawn in draws] == [0, 1, 10, 50, 100, 100]
    assert all(drawn == sorted(drawn) for drawn in draws)
    for small, large in itertools.pairwise(draws):
        assert set(small) <= set(large)


def test_rows_are_drawn_equally_often() -> None:
    drawn = [int(row.id) for seed in range(400) for row in draw(ROWS, 10, seed)]
    counts = [drawn.count(place) for place in range(100)]  # 40 expected, standard deviation 6
    assert min(counts) > 40 - 5 * 6
    assert max(counts) < 40 + 5 * 6
