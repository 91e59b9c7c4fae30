"""Greedy completions by continuous batching: what `generate` does where nothing is sampled.

Prompts join a batch of rows (decoding.py) as places become free, on a CPU in the same pass in which
the other rows go on. What all of them begin with, such as the system turn or the examples of
`--few-shot`, is read once. How a text goes on is guessed from its prompt and itself (guesses.py).
In float32 the completions are those of transformers' own loop (generation.py).
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorakit.models.base import Base
from lorakit.models.completions import StopTexts, check_finite, until_end
from lorakit.models.decoding import Ending, Row, RowBatch
from lorakit.models.guesses import Chances, Drafts
from lorakit.models.prefixes import Prefix, shared_prefix
from lorakit.models.reading import Reader
from lorakit.settings import GenerationSettings

# Rows that join in a pass of their own do so when this part of the batch is free. A pass costs its
# reading of the weights besides its tokens: joining one by one repeats that, and waiting leaves
# places empty. In replays of texts by tiny and SmolLM2, a fourth was cheapest, an eighth or a half
# hardly dearer, and all of it worst.
_JOINING = 4


@dataclass(kw_only=True)
class _NumberedRow(Row):
    """The row of a prompt (its number)."""

    number: int


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
    reader.alike = len(begins)
    chances = Chances()
    waiting = deque(
        _NumberedRow(list(ids), len(ids), Drafts(ids, chances), opened=opens, number=number)
        for number, (ids, opens) in enumerate(
            zip(prompts, opened or [False] * len(prompts), strict=True)
        )
    )
    batch: RowBatch[_NumberedRow] = RowBatch(reader, ending)
    ended = {row.number: row.written for row in _decoded(batch, waiting, size, prefix)}
    return [until_end(ended[number], base.end_tokens) for number in range(len(prompts))]


def _decoded(
    batch: RowBatch[_NumberedRow],
    waiting: deque[_NumberedRow],
    size: int,
    prefix: Prefix | None,
) -> Iterator[_NumberedRow]:
    """Yield the rows that wait, as they end; a prefix of their tokens is read already."""
    while waiting or batch.rows:
        free = min(size - len(batch.rows), len(waiting))
        beside = batch.fit_beside(itertools.islice(waiting, free), prefix) if batch.rows else 0
        if not beside and free and free >= min(len(waiting), max(1, size // _JOINING)):
            yield from batch.join([waiting.popleft() for _ in range(free)], prefix)
            continue
        batch.guess()
        if beside:
            yield from batch.step_beside([waiting.popleft() for _ in range(beside)], prefix)
        else:
            yield from batch.step()
