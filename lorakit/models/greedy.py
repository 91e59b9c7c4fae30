"""Greedy completions by continuous batching: what `generate` does where nothing is sampled.

Prompts join a batch of rows (decoding.py) as places become free. What all of them begin with, such
as the system turn or the examples of `--few-shot`, is read once. How a text goes on is guessed from
its prompt and itself, for as long as guesses come true. In float32 the completions are those of
transformers' own loop (generation.py).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorakit.models.base import Base
from lorakit.models.completions import StopTexts, check_finite, until_end
from lorakit.models.decoding import GUESSED, Drafts, Ending, Row, RowBatch
from lorakit.models.prefixes import Prefix, shared_prefix
from lorakit.models.reading import Reader
from lorakit.settings import GenerationSettings

# Rows join when this part of the batch is free. A pass costs its reading of the weights besides its
# tokens: joining one by one repeats that, and waiting leaves places empty. In replays of texts by
# tiny and SmolLM2, a fourth was cheapest, an eighth or a half hardly dearer, and all of it worst.
_JOINING = 4
# Tokens after which the next ones are guessed. On a CPU a guess costs what any token costs, which
# at 16 rows is nearly half of a row's share of a step, so that it pays if half of all come true: on
# SmolLM2's answers they do. After runs of one token fewer come true, after three there are fewer;
# neither changes the time by more than a few per cent. To begin with several guesses, to go on to
# eight, or to guess only where the last tokens could have been guessed gains nothing more.
_LEAST_RUN = 2


@dataclass(kw_only=True)
class _NumberedRow(Row):
    """The row of a prompt (its number), and how many tokens are guessed for it next."""

    number: int
    guessed: int = 1

    def guess_next(self, most: int) -> None:
        """Guess up to `most` tokens to follow."""
        self.guess = self.drafts.guess(self.ids, min(self.guessed, most))

    def accept(self, predicted: Sequence[int], ends: Ending) -> bool:
        """Accept as every row; guess one token more next time if all came true, else one."""
        ended = super().accept(predicted, ends)
        if self.guess:
            right = tuple(self.ids[-len(self.guess) - 1 : -1]) == tuple(self.guess)
            self.guessed = min(GUESSED, self.guessed + 1) if right else 1
        return ended


@torch.inference_mode()
def complete_greedily(
    base: Base,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    opened: Sequence[bool] = (),
    *,
    at_once: int,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to and without the first end token.

    At most `at_once` prompts are decoded at a time; the rest is as in `complete` of generation.py.
    """
    size, most = min(at_once, len(prompts)), settings.max_new_tokens
    check = functools.partial(check_finite, name=base.name)
    reader = Reader(base.model, size, max(map(len, prompts)) + most - 1, check)
    stop = StopTexts(base, settings.stop) if settings.stop else None
    ending = Ending(frozenset(base.end_tokens), most, stop)
    begins = shared_prefix(prompts)
    prefix = reader.read_prefix(begins) if begins else None
    waiting = deque(
        _NumberedRow(list(ids), len(ids), Drafts(ids, _LEAST_RUN), opened=opens, number=number)
        for number, (ids, opens) in enumerate(
            zip(prompts, opened or [False] * len(prompts), strict=True)
        )
    )
    batch: RowBatch[_NumberedRow] = RowBatch(reader, ending)
    ended = {row.number: row.written for row in _decoded(batch, waiting, size, prefix, most)}
    return [until_end(ended[number], base.end_tokens) for number in range(len(prompts))]


def _decoded(
    batch: RowBatch[_NumberedRow],
    waiting: deque[_NumberedRow],
    size: int,
    prefix: Prefix | None,
    most: int,
) -> Iterator[_NumberedRow]:
    """Yield the rows that wait, as they end; a prefix of their tokens is read already."""
    while waiting or batch.rows:
        free = size - len(batch.rows)
        if waiting and free >= min(len(waiting), max(1, size // _JOINING)):
            joining = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            yield from batch.join(joining, prefix)
        else:
            for row in batch.rows:
                row.guess_next(most - row.length - 1)
            yield from batch.step()
