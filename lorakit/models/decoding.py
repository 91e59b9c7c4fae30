"""Greedy decoding in a batch whose rows come and go, several tokens of a row at a time.

A row is a prompt and the text being written for it. When it ends, its place goes to the next one,
so that no place waits for the longest text of a batch. A row may also read tokens that are guessed
to follow, in the same pass as its last token: those that the model would have written are accepted
(as in speculative decoding), so that what is written is what one token at a time would have given.
Two rows in a batch, the first with a guess of two tokens:

    the model reads    and predicts   so that the rows go on as
    … a | b c          b x y          … a b x          b is confirmed, c should have been x
    … d                e              … d e

What is guessed is decided in guesses.py, how tokens are read into rows in reading.py, which rows
come next by whoever calls this: greedy.py, and boundary/decode.py for the rows of many boundaries.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lorakit.models.completions import StopTexts
from lorakit.models.guesses import GUESSED, Drafts, StepCost, step_cost, worth_guessing
from lorakit.models.prefixes import Prefix
from lorakit.models.reading import Reader

# Prompts are read so many tokens at a time, never less than one prompt. That bounds memory. What
# a CPU computes of fewer stays in its cache, and in memory that the system has given before: 2,040
# tokens took SmolLM2 3.1 s in one pass, 2.6 in two, and 2.8 in six.
_READ_AT_ONCE, _READ_ON_A_CPU = 2048, 1024
_LARGEST_MASK = 1 << 22  # numbers, of a step that reads prompts as well


@dataclass
class Row:
    """A row of the batch: its tokens, and what is guessed to follow.

    `ids` are the prompt's tokens and those written so far, which begin at `start`; `guess` are the
    tokens that the model reads after them and verifies. `opened`: the prompt has begun reasoning.
    """

    ids: list[int]
    start: int
    drafts: Drafts
    guess: Sequence[int] = ()
    opened: bool = False

    @property
    def written(self) -> list[int]:
        return self.ids[self.start :]

    @property
    def length(self) -> int:
        """How many tokens are written."""
        return len(self.ids) - self.start

    def accept(self, predicted: Sequence[int], ends: Ending) -> bool:
        """Append the predictions that confirm the guess and the next one; return whether it ends.

        The first of `predicted` follows the row's last token, each later one a token of the guess.
        """
        for place, token in enumerate(predicted):
            self.ids.append(token)
            self.drafts.learn(self.ids)
            if ends(self):
                return True
            if place < len(self.guess) and self.guess[place] != token:
                return False
        return False


@dataclass(frozen=True)
class Ending:
    """Says whether a row ends: by an end token, after `most` tokens, or by a stop text."""

    tokens: frozenset[int]
    most: int
    stop: StopTexts | None = None

    def __call__(self, row: Row) -> bool:
        if row.ids[-1] in self.tokens or row.length == self.most:
            return True
        return self.stop is not None and self.stop.end(row.written, row.opened)


R = TypeVar("R", bound=Row)


class RowBatch(Generic[R]):
    """The rows being decoded; the row at place i of `rows` is row i of the reader.

    Every method but `guess` and `fit_beside` reads something for some rows, appends what the model
    predicts, takes the rows for that end out of the batch, and returns them.
    """

    def __init__(self, reader: Reader, ends: Ending) -> None:
        self.rows: list[R] = []
        self._reader, self._ends = reader, ends
        self._most_at_once = _READ_ON_A_CPU if reader.device.type == "cpu" else _READ_AT_ONCE

    def join(self, rows: Sequence[R], prefix: Prefix | None = None) -> list[R]:
        """Read the prompts of new rows, but for a prefix that was read."""
        ended, start = [], _length(prefix)
        for part in _portions(rows, start, self._most_at_once):
            first, starts = len(self.rows), [start] * len(part)
            tokens = self._begin(part, prefix)
            ended += self._advance(first, part, self._reader.extend(tokens, starts, first, 1))
        return ended

    def _begin(self, rows: Sequence[R], prefix: Prefix | None) -> list[list[int]]:
        """Let new rows hold a prefix; return what is left to read of their prompts."""
        if prefix is not None:
            self._reader.cache.hold(len(self.rows), len(rows), prefix)
        return [row.ids[_length(prefix) :] for row in rows]

    def fan_out(
        self, rows: Sequence[R], splits: Sequence[int], prefix: Prefix | None = None
    ) -> list[R]:
        """Read prompt and guess, which new rows share, until each splits off before its layer.

        `splits` are those layers for all rows but the first, from the lowest up, with which a
        prefix was read, too.
        """
        first, row = len(self.rows), rows[0]
        ids = [*row.ids, *row.guess][_length(prefix) :]
        predicted = self._reader.fan_out(ids, splits, first, len(row.guess) + 1, prefix)
        return self._advance(first, rows, predicted)

    def guess(self) -> None:
        """Guess what follows in every row: what a step reads next.

        Steps that are padded read any guess for nothing.
        """
        guesses = [
            row.drafts.guess(row.ids, min(GUESSED, self._ends.most - row.length - 1))
            for row in self.rows
        ]
        worth = [len(guess.tokens) for guess in guesses]
        if self._reader.ragged:
            chances = [row.drafts.chance(g) for row, g in zip(self.rows, guesses, strict=True)]
            worth = worth_guessing(list(zip(chances, worth, strict=True)), self._cost)
        for row, guess, count in zip(self.rows, guesses, worth, strict=True):
            row.guess = guess.tokens[:count]

    @functools.cached_property
    def _cost(self) -> StepCost:
        return step_cost(self._reader.model)

    def step(self) -> list[R]:
        """Read the last token and the guess of every row."""
        predicted = self._reader.step(*self._next())
        rows, self.rows = self.rows, []
        return self._advance(0, rows, predicted)

    def fit_beside(self, rows: Iterable[R], prefix: Prefix | None = None) -> int:
        """Return how many new rows, the first of these, a step may read as well."""
        if not self._reader.ragged:
            return 0
        start, count, tokens, width = _length(prefix), 0, 0, 0
        visible = max(len(row.ids) for row in self.rows) + GUESSED
        for row in rows:
            new = len(row.ids) - start
            tokens, width, visible = tokens + new, max(width, new), max(visible, len(row.ids))
            mask = (len(self.rows) + count + 1) * width * visible
            if tokens > self._most_at_once or mask > _LARGEST_MASK:
                break
            count += 1
        return count

    def step_beside(self, joining: Sequence[R], prefix: Prefix | None = None) -> list[R]:
        """Step, and read in the same pass the prompts of new rows, but for a prefix that was read.

        So no row waits for those that join, and the weights are read once for all.
        """
        tokens, starts = self._next()
        keep = max(map(len, tokens))
        tokens += self._begin(joining, prefix)
        starts += [_length(prefix)] * len(joining)
        predicted = self._reader.extend(tokens, starts, 0, keep)
        rows, self.rows = [*self.rows, *joining], []
        return self._advance(0, rows, predicted)

    def _next(self) -> tuple[list[list[int]], list[int]]:
        """Return what a step reads of every row, and where that begins."""
        tokens = [[row.ids[-1], *row.guess] for row in self.rows]
        return tokens, [len(row.ids) - 1 for row in self.rows]

    def _advance(
        self, first: int, rows: Sequence[R], predicted: Sequence[Sequence[int]]
    ) -> list[R]:
        """Let each row accept its predictions; the last rows that go on move into gaps."""
        ended, going = [], {}
        for place, (row, tokens) in enumerate(zip(rows, predicted, strict=True), first):
            if row.accept(tokens[len(tokens) - len(row.guess) - 1 :], self._ends):
                ended.append(row)
            else:
                going[place] = row
        places = range(first, first + len(going))
        gaps = [place for place in places if place not in going]
        for gap, place in zip(gaps, [place for place in going if place not in places], strict=True):
            self._reader.cache.move(place, gap)
            going[gap] = going.pop(place)
        self.rows += [going[place] for place in places]
        return ended


def _length(prefix: Prefix | None) -> int:
    return 0 if prefix is None else prefix.tokens


def _portions(rows: Sequence[R], prefix: int, most: int) -> Iterator[Sequence[R]]:
    """Yield runs of rows whose prompts, but for a prefix, are read in one pass: `most` tokens."""
    begin, tokens = 0, 0
    for end, row in enumerate(rows):
        new = len(row.ids) - prefix
        if end > begin and tokens + new > most:
            yield rows[begin:end]
            begin, tokens = end, 0
        tokens += new
    yield rows[begin:]
