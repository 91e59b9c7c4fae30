"""Samples: the draw is the same everywhere, and fair."""

from __future__ import annotations

import itertools

import pytest

from lorakit.errors import LorakitError
from lorakit.recipes.request import Tally
from lorakit.recipes.samples import draw, draw_balanced
from lorakit.records.record import Record

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


# — equal numbers of every answer —

ANSWERS = [
    Record({"id": str(number), "completion": " Yes" if number % 10 == 0 else " No"}, "x")
    for number in range(100)
]


@pytest.mark.parametrize(
    ("count", "share"), [(None, 10), (20, 10), (200, 10), (6, 3), (7, 3), (1, 0)]
)
def test_a_balanced_draw_has_as_many_of_each_answer(count: int | None, share: int) -> None:
    notes: list[str] = []
    balanced = draw_balanced(iter(ANSWERS), count, 0, Tally(say=notes.append))
    answers = [record.completion for record in balanced]
    assert (answers.count(" Yes"), answers.count(" No")) == (share, share)
    places = [int(record.id) for record in balanced]
    assert places == sorted(places)
    assert notes == [f"balanced: {share} of each answer, of 10 Yes and 90 No."]


def test_a_balanced_draw_depends_on_the_seed_alone() -> None:
    ids = [
        [record.id for record in draw_balanced(ANSWERS, None, seed, Tally())] for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("records", [[], ANSWERS[:1], ANSWERS[1:9]], ids=["none", "Yes", "No"])
def test_one_answer_alone_cannot_be_balanced(records: list[Record]) -> None:
    with pytest.raises(LorakitError, match=r"^--balance needs two answers but there is "):
        draw_balanced(records, None, 0, Tally())
