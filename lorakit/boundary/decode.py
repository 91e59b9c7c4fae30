"""Greedy decoding of the same prompts at many boundaries, in batches whose rows come and go.

Exactly what each boundary alone would write (in float32; other batches round half precision
otherwise), for less work: a prompt goes through the layers below a boundary once for all boundaries
above it, together with a draft, the output of a boundary done before, which the same pass verifies
for all of them. Rows for which the draft was wrong are decoded on, several drafted tokens a step,
and the row of a finished one goes to the next. There are never more than `batch_size` rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lorakit.boundary.drafts import Drafts
from lorakit.boundary.gates import Gates
from lorakit.boundary.kv_cache import Slots, can_slot
from lorakit.models.base import Base

FANNED = 4  # boundaries that share a pass over a prompt and its draft
DRAFTED = 4  # tokens guessed a row and step
_TRIED = 4  # boundaries on which a model is tried
_UNLIKE = (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError)


@dataclass
class _Row:
    """A prompt at a boundary: `ids` are the prompt's tokens and those written so far."""

    prompt: int
    boundary: int
    ids: list[int]
    start: int
    guessed: Sequence[int] = ()


class Written(NamedTuple):
    """What was written for a prompt (its number) at a boundary: the tokens before the end."""

    prompt: int
    boundary: int
    tokens: list[int]


class Pool:
    """The decoding of `prompts` (tokens) at boundaries; LoRA is on the base, its gates stand."""

    def __init__(
        self, base: Base, gates: Gates, prompts: Sequence[Sequence[int]], new: int, batch_size: int
    ) -> None:
        self._gates, self._new, self._size = gates, new, batch_size
        self._ends = frozenset(base.end_tokens)
        self._end = base.end_tokens[0]
        self._prompts = [list(prompt) for prompt in prompts]
        self._drafts = [Drafts(prompt) for prompt in self._prompts]
        self._slots = Slots(base.model, batch_size, max(map(len, prompts)) + new)
        self._rows: list[_Row] = []

    @torch.inference_mode()
    def run(self, boundaries: Sequence[int]) -> Iterator[Written]:
        """Yield what is written for every prompt at every boundary, in the order it is done.

        A prompt begins at the highest boundary; when the lowest of a few is done, its output is the
        draft of the few below it.
        """
        high, *others = sorted(boundaries, reverse=True)
        fans = self._fans(others)
        below = dict(zip([high, *(fan[-1] for fan in fans)], fans, strict=False))
        numbers = sorted(range(len(self._prompts)), key=lambda n: len(self._prompts[n]))
        drafted: deque[Written] = deque()
        while numbers or drafted or self._rows:
            free = self._size - len(self._rows)
            if numbers and free >= min(len(numbers), max(1, self._size // 2)):
                done = self._join([numbers.pop() for _ in range(min(free, len(numbers)))], high)
            elif drafted and free >= len(below[drafted[0].boundary]):
                draft = drafted.popleft()
                done = self._fan_out(draft, below[draft.boundary])
            else:
                done = self._step()
            for written in done:
                if written.boundary in below:
                    drafted.append(written)
                yield written

    def _fans(self, boundaries: Sequence[int]) -> list[Sequence[int]]:
        """Cut boundaries, highest first, into the few that share a pass over a prompt."""
        size = min(FANNED, self._size)
        return [boundaries[first : first + size] for first in range(0, len(boundaries), size)]

    def _join(self, numbers: Sequence[int], boundary: int) -> Iterator[Written]:
        first = len(self._rows)
        prompts = [self._prompts[number] for number in numbers]
        self._gates.set([boundary])
        found = self._slots.extend(prompts, [0] * len(prompts), first, 1)
        rows = [self._begin(number, boundary, ()) for number in numbers]
        yield from self._take(first, rows, found)

    def _fan_out(self, draft: Written, boundaries: Sequence[int]) -> Iterator[Written]:
        first, order = len(self._rows), [boundaries[0], *sorted(boundaries[1:])]
        self._gates.set(order)
        ids = [*self._prompts[draft.prompt], *draft.tokens]
        found = self._slots.fan_out(ids, order, first, len(draft.tokens) + 1)
        rows = [self._begin(draft.prompt, boundary, draft.tokens) for boundary in order]
        yield from self._take(first, rows, found)

    def _begin(self, number: int, boundary: int, guessed: Sequence[int]) -> _Row:
        prompt = self._prompts[number]
        return _Row(number, boundary, list(prompt), len(prompt), guessed)

    def _step(self) -> Iterator[Written]:
        for row in self._rows:
            most = min(DRAFTED, self._new - (len(row.ids) - row.start) - 1)
            row.guessed = self._drafts[row.prompt].guess(row.ids, most)
        tokens = [[row.ids[-1], *row.guessed] for row in self._rows]
        self._gates.set([row.boundary for row in self._rows])
        starts = [len(row.ids) - 1 for row in self._rows]
        found = self._slots.extend(tokens, starts, 0, max(map(len, tokens)))
        rows, self._rows = self._rows, []
        yield from self._take(0, rows, found)

    def _take(
        self, first: int, rows: Sequence[_Row], found: Sequence[Sequence[int]]
    ) -> Iterator[Written]:
        """Add to rows `first` … what was found after their guesses; yield and drop the finished."""
        done = []
        for place, (row, best) in enumerate(zip(rows, found, strict=True), first):
            if self._accept(row, best[len(best) - len(row.guessed) - 1 :]):
                done.append(row)
            else:
                if len(self._rows) != place:
                    self._slots.move(place, len(self._rows))
                self._rows.append(row)
        for row in done:
            tokens = row.ids[row.start :]
            ended = tokens and tokens[-1] in self._ends
            yield Written(row.prompt, row.boundary, tokens[:-1] if ended else tokens)

    def _accept(self, row: _Row, best: Sequence[int]) -> bool:
        """Write tokens while the guess was the most probable, and one more; say if it ended."""
        for place, token in enumerate(best):
            row.ids.append(token)
            self._drafts[row.prompt].add(row.ids, len(row.ids) - 1)
            if token in self._ends or len(row.ids) - row.start == self._new:
                return True
            if place < len(row.guessed) and row.guessed[place] != token:
                return False
        return False


@torch.inference_mode()
def can_pool(base: Base, gates: Gates, prompt: Sequence[int]) -> bool:
    """Say whether a model can be decoded so, by trying it on a prompt.

    In two parts, and fanned out, it has to give the same most probable tokens as the whole prompt
    in the model's own forward (in half precision: nearly all of them).
    """
    if not can_slot(base.model):
        return False
    top, half = base.layers, (len(prompt) + 1) // 2
    gates.set([top])
    plain = base.model(input_ids=torch.tensor([list(prompt)], device=base.device)).logits[0]
    expected = plain.float().argmax(-1).tolist()
    order = [top, *range(1, top)][:_TRIED]
    slots = Slots(base.model, len(order), len(prompt))
    try:
        parts = [
            (part, start) for part, start in ((prompt[:half], 0), (prompt[half:], half)) if part
        ]
        found = [t for part, start in parts for t in slots.extend([part], [start], 0, len(part))[0]]
        gates.set(order)
        fanned = slots.fan_out(prompt, order, 0, len(prompt))[0]
    except _UNLIKE:
        return False
    alike: int = sum(a == b == c for a, b, c in zip(found, fanned, expected, strict=True))
    needed = 1.0 if base.dtype == torch.float32 else 0.8
    return alike >= needed * len(prompt)
