"""Greedy decoding in a batch whose rows come and go, several tokens of a row at a time.

A row is a prompt and the text being written for it. When it ends, its place goes to the next one,
so that no place waits for the longest text of a batch. A row may also read tokens that are guessed
to follow, in the same pass as its last token: those that the model would have written are accepted
(as in speculative decoding), so that what is written is what one token at a time would have given.
Two rows in a batch, the first with a guess of two tokens:

    the model reads    and predicts   so that the rows go on as
    … a | b c          b x y          … a b x          b is confirmed, c should have been x
    … d                e              … d e

How tokens are read into rows is decided in reading.py, which rows come next by whoever calls this:
greedy.py, and boundary/decode.py for the rows of many boundaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lorakit.models.completions import StopTexts
from lorakit.models.prefixes import Prefix
from lorakit.models.reading import Reader

# Prompts are read so many tokens at a time, never less than one prompt. That bounds memory. What
# a CPU computes of fewer stays in its cache, and in memory that the system has given before: 2,040
# tokens took SmolLM2 3.1 s in one pass, 2.6 in two, and 2.8 in six.
_READ_AT_ONCE, _READ_ON_A_CPU = 2048, 1024
_LARGEST_MASK = 1 << 22  # numbers, of a step that reads prompts as well
GUESSED = 4  # tokens guessed for a row in one step
_RUNS = (3, 2, 1)  # lengths of the runs of tokens that guesses are based on, longest first
# Tokens guessed after a run where each costs what any token costs: up to the last of which a fourth
# came true (titles by SmolLM2 under 31 cuts). More take longer to read than they save.
_LIKELY = {3: 4, 2: 2, 1: 1}
_RATE = 1 / 8  # weight of the latest guess in the chance that the next one comes true
# What the first guessed token of a row costs besides, in tokens: the row attends by itself then.
_FIRST = 1.5


def worth_guessing(chance: float, price: float) -> int:
    """Return how many tokens to guess where each comes true with a chance, if those before do.

    `price` is what reading a token costs, as a part of what writing one costs.
    """
    most, tokens, gain, right = 0.0, 0, -_FIRST * price, 1.0
    for guessed in range(1, GUESSED + 1):
        right *= chance
        gain += right - price
        if gain > most:
            most, tokens = gain, guessed
    return tokens


class Drafts:
    """Guesses how a text of one prompt goes on, from all the texts of that prompt.

    It remembers what last followed every run of up to three tokens, in the prompt and in the texts
    written: after 5 6 7 8 and then 5 6 9, what follows 1 5 6 is guessed to be 9. Guesses are based
    on runs of `shortest` tokens at least; `sparing` ones end where they are no longer likely.
    `chance` tells how often a guess of the next token has been right of late, or would have been.
    """

    def __init__(self, prompt: Sequence[int], shortest: int = 1, *, sparing: bool = False) -> None:
        self._runs = {run: _LIKELY[run] if sparing else GUESSED for run in _RUNS if run >= shortest}
        self._after: dict[tuple[int, ...], tuple[Sequence[int], int]] = {}
        for place in range(1, len(prompt)):
            self.add(prompt, place)
        self.chance = 0.5

    def add(self, ids: Sequence[int], place: int) -> None:
        """Note that ids[place] follows the tokens before it; `ids` may grow later."""
        for run in self._runs:
            if run <= place:
                self._after[tuple(ids[place - run : place])] = (ids, place)

    def learn(self, ids: Sequence[int]) -> None:
        """Note the last of `ids`, which was written, and whether it would have been guessed."""
        if guess := self.guess(ids[-1 - max(_RUNS) : -1], 1):
            self.chance += _RATE * ((guess[0] == ids[-1]) - self.chance)
        self.add(ids, len(ids) - 1)

    def guess(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """Return up to `most` tokens that may follow `ids`: those after its longest known run."""
        if most > 0:
            for run, likely in self._runs.items():
                if run <= len(ids) and (source := self._after.get(tuple(ids[-run:]))):
                    text, place = source
                    return text[place : place + min(most, likely)]
        return ()


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

    Every method reads something for some rows, appends what the model predicts, takes the rows for
    that end out of the batch, and returns them.
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
            if prefix is not None:
                self._reader.cache.hold(first, len(part), prefix)
            tokens = [row.ids[start:] for row in part]
            ended += self._advance(first, part, self._reader.extend(tokens, starts, first, 1))
        return ended

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

    def step(self) -> list[R]:
        """Read the last token and the guess of every row."""
        predicted = self._reader.step(*self._next())
        rows, self.rows = self.rows, []
        return self._advance(0, rows, predicted)

    def fit_beside(self, rows: Iterable[R], prefix: Prefix | None = None) -> int:
        """Return how many new rows, the first of these, a step may read as well."""
        if not self._reader.ragged:
            return 0
        start, count, tokens, width, visible = _length(prefix), 0, 0, 0, self._visible()
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
        start = _length(prefix)
        if prefix is not None:
            self._reader.cache.hold(len(self.rows), len(joining), prefix)
        tokens, starts = self._next()
        keep = max(map(len, tokens))
        tokens += [row.ids[start:] for row in joining]
        predicted = self._reader.extend(tokens, [*starts, *[start] * len(joining)], 0, keep)
        rows, self.rows = [*self.rows, *joining], []
        return self._advance(0, rows, predicted)

    def _next(self) -> tuple[list[list[int]], list[int]]:
        """Return what a step reads of every row, and where that begins."""
        tokens = [[row.ids[-1], *row.guess] for row in self.rows]
        return tokens, [len(row.ids) - 1 for row in self.rows]

    def _visible(self) -> int:
        """Return how many positions the longest row may have after a step."""
        return max(len(row.ids) for row in self.rows) + GUESSED

    def _advance(
        self, first: int, rows: Sequence[R], predicted: Sequence[Sequence[int]]
    ) -> list[R]:
        """Let each row accept its predictions; rows that go on move up to close gaps."""
        ended = []
        for place, (row, tokens) in enumerate(zip(rows, predicted, strict=True), first):
            if row.accept(tokens[len(tokens) - len(row.guess) - 1 :], self._ends):
                ended.append(row)
            else:
                if len(self.rows) != place:
                    self._reader.cache.move(place, len(self.rows))
                self.rows.append(row)
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
