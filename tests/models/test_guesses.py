"""What is guessed to follow, how likely that is, and how much of it is worth reading."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from lorakit.models import guesses
from lorakit.models.guesses import (
    GUESSED,
    NO_GUESS,
    Chances,
    Drafts,
    Guess,
    StepCost,
    step_cost,
    worth_guessing,
)

COST = StepCost(20, rounds=True)


def drafts_of(*prompt: int) -> Drafts:
    return Drafts(prompt, Chances())


def test_a_guess_is_what_followed_the_longest_run_last() -> None:
    drafts = drafts_of(5, 6, 7, 8)
    assert drafts.guess([1, 5, 6], 4) == Guess(2, (7, 8))
    drafts.learn([5, 6, 9])
    assert drafts.guess([1, 5, 6], 4) == Guess(2, [9])
    assert drafts.guess([1, 6, 7], 1) == Guess(2, (8,))
    assert drafts.guess([5, 6, 7], 4) == Guess(3, (8,))
    assert drafts.guess([5, 6], 0) == drafts.guess([4], 4) == NO_GUESS


def test_guesses_become_likely_as_they_come_true_by_the_run_they_are_based_on() -> None:
    chances = Chances()
    one, other = Drafts([5, 6, 7, 5, 6, 8], chances), Drafts([1, 2, 3, 1, 2, 3], chances)
    ids = [9, 9, 5]
    one.learn(ids)  # nothing followed 9 before
    assert {chances.after(run) for run in (1, 2, 3)} == {0.5}
    for token, run, right in ((6, 1, True), (7, 2, False), (5, 3, True), (4, 3, False)):
        before = {n: chances.after(n) for n in (1, 2, 3)}
        ids.append(token)
        one.learn(ids)
        changed = {n: chances.after(n) - before[n] for n in before if chances.after(n) != before[n]}
        assert list(changed) == [run], token
        assert (changed[run] > 0) == right, token
    assert other.chance(other.guess([3, 1, 2])) == chances.after(3), "of all texts"
    assert other.chance(NO_GUESS) == 0.0


def test_a_chance_becomes_what_comes_true() -> None:
    chances, draw = Chances(), random.Random(0)
    for _ in range(2000):
        chances.learn(2, right=draw.random() < 0.8)
    assert chances.after(2) == pytest.approx(0.8, abs=0.1)
    assert chances.after(1) == 0.5


def speed(guesses: Sequence[tuple[float, int]], counts: Sequence[int]) -> float:
    """Return the tokens that texts grow by, over what a step takes."""
    gains = sum(
        chance**place
        for (chance, _), count in zip(guesses, counts, strict=True)
        for place in range(1, count + 1)
    )
    rows = len(guesses)
    return (rows + gains) / COST.of(rows + sum(counts))


def test_texts_grow_fastest_by_what_is_worth_guessing() -> None:
    draw = random.Random(0)
    for rows in (1, 2, 3, 4):
        for _ in range(40):
            guesses = [(draw.random(), draw.randrange(GUESSED + 1)) for _ in range(rows)]
            worth = worth_guessing(guesses, COST)
            every = itertools.product(*(range(count + 1) for _, count in guesses))
            best = max(speed(guesses, counts) for counts in every)
            assert speed(guesses, worth) == pytest.approx(best)


def test_unlikely_tokens_are_read_only_where_products_are_filled_up_anyway() -> None:
    assert worth_guessing([(0.2, 4)] * 16, COST) == [0] * 16
    assert worth_guessing([(1.0, 4)] * 16, COST) == [4] * 16
    assert sum(worth_guessing([(0.2, 4)] * 14, COST)) == 2  # 14 rows take as long as 16
    assert worth_guessing([(0.2, 4)] * 14 + [(0.9, 1)], COST) == [0] * 14 + [1]
    assert worth_guessing([], COST) == []


def test_a_step_costs_what_its_tokens_do_rounded_up_where_products_are() -> None:
    assert COST.of(14) == COST.of(16) == 36
    assert StepCost(20, rounds=False).of(14) == 34
    assert sum(worth_guessing([(0.2, 4)] * 14, StepCost(20, rounds=False))) == 0


def test_less_likely_tokens_are_read_where_steps_cost_more_beside_them() -> None:
    small, large = (torch.nn.Sequential(torch.nn.Linear(n, n)) for n in (100, 10_000))
    assert step_cost(small).besides > step_cost(large).besides
    assert step_cost(large).besides > step_cost(torch.nn.Sequential()).besides
    guesses = [(0.4, 1)] * 4
    assert worth_guessing(guesses, StepCost(2, rounds=True)) == [0] * 4
    assert worth_guessing(guesses, StepCost(100, rounds=True)) == [1] * 4


def test_a_step_costs_less_with_weights_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 24))
    plain = step_cost(model)
    assert plain.rounds
    monkeypatch.setattr(guesses, "reads_half", lambda layer: layer is model[1])
    half = step_cost(model)
    assert not half.rounds
    assert plain.besides - half.besides == pytest.approx(guesses._WEIGHTS * 3 / 4 / 2)
