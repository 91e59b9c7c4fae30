"""The worked example of the pool, and guesses; that outputs are right is in test_evaluate.py."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.boundary import decode
from lorakit.boundary.cuts import Cut, bottom
from lorakit.boundary.decode import Pool

PROMPT, END, LAYERS = "p", ".", 3
WRITTEN = {3: "abc.", 2: "abc.", 1: "ay.", 0: "x."}  # by boundary


def ids_of(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def text_of(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


class ScriptedReader:
    """Stands in for the cache and the model: each boundary writes what WRITTEN says."""

    passes: list[tuple[str, list[tuple[int, str]]]]
    ragged = records = False
    device = torch.device("cpu")

    def __init__(self, model: Any, rows: int, length: int) -> None:
        self.rows = [""] * rows
        self.passes = model.passes
        self.gates = model.gates
        self.cache = self

    def predict(self, row: int, boundary: int, start: int, new: str, keep: int) -> list[int]:
        self.rows[row] = self.rows[row][:start] + new
        text = self.rows[row]
        ends = range(len(text) - min(keep, len(new)) + 1, len(text) + 1)
        script = f"{PROMPT}{WRITTEN[boundary]}"
        right = [script[end] if script.startswith(text[:end]) else "?" for end in ends]
        return ids_of("".join(right).rjust(keep, "?"))

    def extend(
        self, tokens: Sequence[Sequence[int]], starts: Sequence[int], first: int, keep: int
    ) -> list[list[int]]:
        new = [text_of(row) for row in tokens]
        boundaries = self.gates.of(len(new))
        self.passes.append(("extend", list(zip(boundaries, new, strict=True))))
        rows = zip(boundaries, starts, new, strict=True)
        return [self.predict(first + n, k, at, row, keep) for n, (k, at, row) in enumerate(rows)]

    def step(self, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[int]]:
        return self.extend(tokens, starts, 0, max(map(len, tokens)))

    def fan_out(
        self, tokens: Sequence[int], splits: Sequence[int], first: int, keep: int, prefix: None
    ) -> list[list[int]]:
        new, boundaries = text_of(tokens), self.gates.boundaries
        assert list(splits) == boundaries[1:], "boundary k splits off before layer k"
        self.passes.append(("fan out", [(k, new) for k in boundaries]))
        return [self.predict(first + n, k, 0, new, keep) for n, k in enumerate(boundaries)]

    def move(self, source: int, target: int) -> None:
        self.rows[target] = self.rows[source]


class Boundaries:
    """Stands in for the gates."""

    def set(self, cuts: Sequence[Cut], tokens: Sequence[int] | None = None) -> None:
        self.boundaries = [sum(map(bool, cut.factors)) for cut in cuts]

    def of(self, rows: int) -> list[int]:
        return self.boundaries if len(self.boundaries) == rows else self.boundaries * rows


def test_the_worked_example_is_what_the_pool_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "Reader", ScriptedReader)
    gates: Any = Boundaries()
    model = SimpleNamespace(passes=[], gates=gates, modules=list)
    base: Any = SimpleNamespace(model=model, end_tokens=tuple(ids_of(END)))
    pool = Pool(base, gates, [ids_of(PROMPT)], 8, batch_size=4)
    cuts = {bottom(k, LAYERS): k for k in (3, 2, 1, 0)}
    outputs = {(cuts[cut], text_of(tokens)) for _, cut, tokens in pool.run(list(cuts))}
    assert outputs == {(3, "abc"), (2, "abc"), (1, "ay"), (0, "x")}
    assert model.passes == [
        ("extend", [(3, "p")]),
        ("extend", [(3, "a")]),
        ("extend", [(3, "b")]),
        ("extend", [(3, "c")]),
        ("fan out", [(2, "pabc"), (0, "pabc"), (1, "pabc")]),
        ("extend", [(1, "y"), (0, "x")]),
    ]
