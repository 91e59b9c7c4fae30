"""Greedy decoding of the same prompts under many cuts, in batches whose rows come and go.

Every boundary writes exactly what it would write alone (in float32; half precision rounds
differently in other batches), but with less work. The layers below a boundary
compute the same for it and for all higher boundaries; and neighbouring boundaries often write the
same text. So a prompt is decoded at its highest boundary first, and that output is the draft for
the boundaries below it: prompt and draft go through the model once, splitting up by boundary on the
way, and each boundary keeps the draft's tokens up to the first that it would not have written (as
in speculative decoding, with the highest boundary as the draft model). A prompt p at boundaries 3,
2, 1 and 0, where p@k is its row at boundary k:

    join      p@3 reads p               and writes a
    step      p@3 reads a, then b …     and writes b, c and the end: a b c is done, a draft
    fan out   p a b c is read once by   p@2, which confirms a b c and the end: done
                                        p@0, which writes x in the place of a
                                        p@1, which confirms a, then writes y
    step      p@0 reads x, p@1 reads y  as two rows of one batch; each also reads up to four tokens
                                        guessed from all that was written for p, and verifies them

Cuts of other kinds are decoded alike: a row splits off before the first layer in which its cut
differs from that of the fan's first row, and "highest" is the first in descending order of cuts.

When rows leave the batch, their places go to other prompts, or to the next few boundaries of a
prompt, whose draft is the output of the lowest boundary done. There are at most `batch_size` rows.
What all prompts begin with goes through the model once for each fan. Its keys and values are kept,
in each layer those of as many rows as the fan has split up into there. Fans for which they would
take more memory than the batch read it with every prompt.
How rows split up is decided in models/reading.py, which layers apply LoRA to them in gates.py. Rows
that come and go, and guesses, are those of models/decoding.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lorakit.boundary.cuts import Cut, bottom
from lorakit.boundary.gates import Gates
from lorakit.models.base import Base
from lorakit.models.cache_trial import REFUSALS, alike_enough
from lorakit.models.completions import check_finite, until_end
from lorakit.models.decoding import Ending, Row, RowBatch
from lorakit.models.guesses import Chances, Drafts
from lorakit.models.packed import packed_weights
from lorakit.models.prefixes import Prefix, shared_prefix
from lorakit.models.reading import Reader

FANNED = 4  # cuts that share one pass over a prompt and its draft
_TRIED = 4  # cuts under which can_pool tries a model
Fan = tuple[Cut, ...]  # cuts that share one pass over a prompt, in the order of their rows


@dataclass(kw_only=True)
class _CutRow(Row):
    """A prompt (its number) under a cut, as a row of the batch."""

    prompt: int
    cut: Cut


class Output(NamedTuple):
    """The tokens written for a prompt (its number) under a cut, without the end token."""

    prompt: int
    cut: Cut
    tokens: list[int]


Done = Mapping[tuple[Cut, int], list[int]]  # tokens written, by cut and prompt


class Pool:
    """Decodes tokenised prompts under several cuts, with the adapter gated on the base."""

    def __init__(
        self,
        base: Base,
        gates: Gates,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        self._model, self._gates = base.model, gates
        self._size = batch_size
        self._end_tokens = base.end_tokens
        self._prompts = [list(prompt) for prompt in prompts]
        length = max(map(len, prompts)) + max_new_tokens
        self._begins = shared_prefix(self._prompts)
        self._share = len(self._begins) / length
        self._prefixes: dict[Fan, Prefix] = {}
        self._reader = Reader(base.model, batch_size, length)
        chances = Chances()
        self._drafts = [Drafts(prompt, chances) for prompt in self._prompts]
        self._batch: RowBatch[_CutRow] = RowBatch(
            self._reader,
            Ending(frozenset(base.end_tokens), max_new_tokens),
        )

    @torch.inference_mode()
    def run(self, cuts: Sequence[Cut], done: Done | None = None) -> Iterator[Output]:
        """Yield the output of every prompt under every cut as soon as it is done.

        A prompt begins with the highest cut. When the lowest cut of a fan is done, its output is
        the draft for the next fan. What is `done` already is not decoded, but where a fan is done
        in part.
        """
        done = done or {}
        highest, *others = sorted(cuts, reverse=True)
        fans = _fans(others, self._size)
        self._holding = fans_that_hold(cuts, self._size, self._share)
        below = dict(zip([highest, *(fan[-1] for fan in fans)], fans, strict=False))
        numbers = sorted(range(len(self._prompts)), key=lambda n: len(self._prompts[n]))
        waiting = [number for number in numbers if (highest, number) not in done]
        begun = [number for number in numbers if (highest, number) in done]
        drafts = deque(filter(None, (_last_draft(n, highest, below, done) for n in begun)))
        with packed_weights(self._model):
            yield from self._decoded(waiting, drafts, highest, below)

    def _decoded(
        self,
        waiting: list[int],
        drafts: deque[Output],
        highest: Cut,
        below: Mapping[Cut, Sequence[Cut]],
    ) -> Iterator[Output]:
        """Yield the outputs of waiting prompts (their numbers) and of drafts."""
        while waiting or drafts or self._batch.rows:
            free = self._size - len(self._batch.rows)
            if waiting and free >= min(len(waiting), max(1, self._size // 2)):
                numbers = [waiting.pop() for _ in range(min(free, len(waiting)))]
                rows = self._join(numbers, highest)
            elif drafts and free >= len(below[drafts[0].cut]):
                draft = drafts.popleft()
                rows = self._fan_out(draft, below[draft.cut])
            else:
                rows = self._step()
            for output in map(self._output, rows):
                if output.cut in below:
                    drafts.append(output)
                yield output

    def _join(self, numbers: Sequence[int], cut: Cut) -> list[_CutRow]:
        """Add rows for prompts (their numbers) under a cut, and decode their first token."""
        self._gates.set([cut])
        rows = [self._new_row(number, cut, ()) for number in numbers]
        return self._batch.join(rows, self._prefix((cut,)))

    def _fan_out(self, draft: Output, cuts: Sequence[Cut]) -> list[_CutRow]:
        """Add a row for the draft's prompt under each cut, highest first, and check the draft."""
        fan = _fan_order(cuts)
        self._gates.set(fan)
        rows = [self._new_row(draft.prompt, cut, draft.tokens) for cut in fan]
        return self._batch.fan_out(rows, _splits(fan), self._prefix(fan))

    def _prefix(self, fan: Fan) -> Prefix | None:
        """Return what a fan holds of what all prompts begin with, if it is read once.

        The gates are set to the fan's cuts.
        """
        if fan not in self._holding:
            return None
        if fan not in self._prefixes:
            first = len(self._batch.rows)
            self._prefixes[fan] = self._reader.read_prefix(self._begins, first, _splits(fan))
        return self._prefixes[fan]

    def _new_row(self, number: int, cut: Cut, guess: Sequence[int]) -> _CutRow:
        prompt, drafts = self._prompts[number], self._drafts[number]
        return _CutRow(list(prompt), len(prompt), drafts, guess, prompt=number, cut=cut)

    def _step(self) -> list[_CutRow]:
        """Feed every row of the batch its last token and a new guess."""
        self._batch.guess()
        rows = self._batch.rows
        cuts = [row.cut for row in rows]
        if self._reader.records:
            self._gates.hold(cuts, self._size, self._reader.device)
        else:
            lengths = [len(row.guess) + 1 for row in rows] if self._reader.ragged else None
            self._gates.set(cuts, lengths)
        return self._batch.step()

    def _output(self, row: _CutRow) -> Output:
        return Output(row.prompt, row.cut, until_end(row.written, self._end_tokens))


def _fans(cuts: Sequence[Cut], batch_size: int) -> list[Sequence[Cut]]:
    """Divide cuts, highest first, into fans: those that share one pass over a prompt."""
    size = min(FANNED, batch_size)
    return [cuts[first : first + size] for first in range(0, len(cuts), size)]


def fans_that_hold(cuts: Iterable[Cut], batch_size: int, share: float) -> dict[Fan, int]:
    """Return the fans that hold what all prompts begin with, and in how many rows, by layer, each.

    It is this `share` of a row's positions. From the highest fan on, as many hold it as take no
    more memory than the batch.
    """
    highest, *others = sorted(cuts, reverse=True)
    layers, holding = len(highest.factors), dict[Fan, int]()
    room = batch_size * layers / share if share else 0.0
    for fan in ((highest,), *map(_fan_order, _fans(others, batch_size))):
        rows = layers + sum(layers - split for split in _splits(fan))
        room -= rows
        if room < 0:
            break
        holding[fan] = rows
    return holding


def _last_draft(
    number: int, highest: Cut, below: Mapping[Cut, Sequence[Cut]], done: Done
) -> Output | None:
    """Return the output from which a prompt goes on, under the lowest cut of its last done fan.

    `below` has the fan that each draft is for. None if the prompt is done.
    """
    cut = highest
    while cut in below and all((other, number) in done for other in below[cut]):
        cut = below[cut][-1]
    return Output(number, cut, list(done[cut, number])) if cut in below else None


def _fan_order(cuts: Sequence[Cut]) -> Fan:
    """Return the highest cut, then the others from the lowest up, as they split off from it."""
    highest, *others = sorted(cuts, reverse=True)
    return (highest, *reversed(others))


def _splits(fan: Fan) -> list[int]:
    """Return the layers before which all cuts but the first split off from the first."""
    return [cut.split_from(fan[0]) for cut in fan[1:]]


@torch.inference_mode()
def can_pool(base: Base, gates: Gates, prompt: Sequence[int]) -> bool:
    """Return whether a Pool can decode with a model, by trying it on a prompt.

    Reading the prompt in two parts, fanned out, and fanned out after a prefix, has to give the same
    most probable tokens as reading it whole by the model's own forward (in half precision, nearly
    all of them).
    """
    layers, half = base.layers, (len(prompt) + 1) // 2
    gates.set([bottom(layers, layers)])
    try:
        if not base.batches_continuously:
            return False
        plain = base.model(input_ids=torch.tensor([list(prompt)], device=base.device)).logits[0]
    except torch.OutOfMemoryError:
        return False
    check_finite(plain, base.name)
    expected = plain.float().argmax(-1).tolist()
    fan = tuple(bottom(k, layers) for k in [layers, *range(1, layers)][:_TRIED])
    reader = Reader(base.model, len(fan), len(prompt))
    try:
        in_parts = [
            token
            for part, start in ((prompt[:half], 0), (prompt[half:], half))
            if part
            for token in reader.extend([part], [start], 0, len(part))[0]
        ]
        gates.set(fan)
        splits = _splits(fan)
        fanned = reader.fan_out(prompt, splits, 0, len(prompt))[0]
        prefix, rest = reader.read_prefix(prompt[:half], 0, splits), prompt[half:]
        after = reader.fan_out(rest, splits, 0, len(rest), prefix)[0] if rest else []
    except REFUSALS:
        return False
    ways = zip(in_parts, fanned, fanned[:half] + after, expected, strict=True)
    alike = [len(set(tokens)) == 1 for tokens in ways]
    return alike_enough(alike, base.dtype)
