"""Guesses how texts go on, which are verified in the pass that reads them (decoding.py).

What follows is guessed to be what last followed the same few tokens, in the prompt or in a text
written for it. On a CPU each token read costs time, so that tokens are guessed where texts grow
fastest by them: as many as are worth what they cost, the likely ones of any row first. How likely a
guess is depends on the length of the run of tokens that it is based on; it is learnt as texts grow.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorakit.models.architecture import Model
from lorakit.models.packed import reads_half
from lorakit.models.products import rounded

GUESSED = 4  # tokens guessed for a row in one step
_RUNS = (3, 2, 1)  # lengths of the runs that guesses are based on, longest first
_RATE = 1 / 50  # weight of the latest guess in the chance that the next one comes true
# What a step takes however few its tokens are, on a CPU: reading the weights, as long as so many
# tokens take, half of that in 16 bits, and calling a layer, as long as so many multiplications. As
# measured with SmolLM2 (34 tokens, where 20 and 76 were slower) and tiny (265, hardly faster than
# 80).
_WEIGHTS, _A_CALL = 25, 6_000_000


class Chances:
    """How often guesses of the next token came true of late, by the run that they are based on."""

    def __init__(self) -> None:
        self._of = dict.fromkeys(_RUNS, 0.5)

    def after(self, run: int) -> float:
        """Return the chance of a guess that is based on a run of so many tokens."""
        return self._of[run]

    def learn(self, run: int, *, right: bool) -> None:
        self._of[run] += _RATE * (right - self._of[run])


class Guess(NamedTuple):
    """Tokens that may follow, and how many tokens they are based on (0: none are guessed)."""

    run: int
    tokens: Sequence[int]


NO_GUESS = Guess(0, ())


class Drafts:
    """Guesses how a text of one prompt goes on, from all the texts of that prompt.

    It remembers what last followed every run of up to three tokens, in the prompt and in the texts
    written: after 5 6 7 8 and then 5 6 9, what follows 1 5 6 is guessed to be 9. `chances` learn,
    of every token that is written, whether it would have been guessed.
    """

    def __init__(self, prompt: Sequence[int], chances: Chances) -> None:
        self._after: dict[tuple[int, ...], tuple[Sequence[int], int]] = {}
        self._chances = chances
        for place in range(1, len(prompt)):
            self._add(prompt, place)

    def _add(self, ids: Sequence[int], place: int) -> None:
        """Note that ids[place] follows the tokens before it; `ids` may grow later."""
        for run in _RUNS:
            if run <= place:
                self._after[tuple(ids[place - run : place])] = (ids, place)

    def learn(self, ids: Sequence[int]) -> None:
        """Note the last of `ids`, which was written."""
        run, tokens = self.guess(ids[-1 - max(_RUNS) : -1], 1)
        if tokens:
            self._chances.learn(run, right=tokens[0] == ids[-1])
        self._add(ids, len(ids) - 1)

    def guess(self, ids: Sequence[int], most: int = GUESSED) -> Guess:
        """Return up to `most` tokens that may follow `ids`: those after its longest known run."""
        if most > 0:
            for run in _RUNS:
                if run <= len(ids) and (source := self._after.get(tuple(ids[-run:]))):
                    text, place = source
                    return Guess(run, text[place : place + most])
        return NO_GUESS

    def chance(self, guess: Guess) -> float:
        """Return how likely a guess's first token is, and each later one if those before are."""
        return self._chances.after(guess.run) if guess.tokens else 0.0


class StepCost(NamedTuple):
    """What a step takes on a CPU, in tokens: so many `besides` its tokens.

    `rounds`: their number is rounded up, as oneDNN's products do.
    """

    besides: float
    rounds: bool

    def of(self, tokens: int) -> float:
        """Return what a step of so many tokens takes."""
        return self.besides + (rounded(tokens) if self.rounds else tokens)


def step_cost(model: Model) -> StepCost:
    """Return what a step takes with a model's weights as they are held now."""
    sizes = [
        (layer.in_features * layer.out_features, reads_half(layer))
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    if not sizes:
        return StepCost(_WEIGHTS, rounds=True)
    half = sum(size for size, is_half in sizes if is_half)
    total = sum(size for size, _ in sizes)
    read = _WEIGHTS * (1 - half / total / 2)
    return StepCost(read + _A_CALL * len(sizes) / total, rounds=2 * half < total)


def worth_guessing(guesses: Sequence[tuple[float, int]], cost: StepCost) -> list[int]:
    """Return how many tokens of each row's guess to read, so that all texts together grow fastest.

    `guesses` are the chance of each token, if those before it come true, and how many there are.
    With n tokens guessed for r rows, the texts grow by r + gains in what a step of r + n takes: the
    n greatest gains, chance^1, chance^2 … of any row.
    """
    gains = sorted(
        (
            (chance**place, row)
            for row, (chance, count) in enumerate(guesses)
            for place in range(1, count + 1)
        ),
        key=lambda gain: -gain[0],
    )
    rows = len(guesses)
    growth = itertools.accumulate((gain for gain, _ in gains), initial=float(rows))
    speeds = [grown / cost.of(rows + n) for n, grown in enumerate(growth)]
    worth = [0] * rows
    for _, row in gains[: speeds.index(max(speeds))]:
        worth[row] += 1
    return worth
