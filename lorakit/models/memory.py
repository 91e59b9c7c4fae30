"""What is done where a device has too little memory: batches are halved, and a note says so.

In float32 a row's result does not depend on what it is batched with, so that only time is lost.
Training halves its micro-batches by itself (training/loss.py): their gradients are summed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from lorakit.errors import LorakitError

T = TypeVar("T")
R = TypeVar("R")


def in_batches(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut rows into batches of `size`; the last may be smaller."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class BatchSize:
    """How many rows go through a model together at most: `rows`, halved where memory runs out."""

    def __init__(self, rows: int, note: Callable[[str], None]) -> None:
        self.rows = rows
        self._note = note

    def over(
        self,
        rows: Sequence[T],
        compute: Callable[[Sequence[T]], R],
        cut: Callable[[Sequence[T], int], Sequence[Sequence[T]]] = in_batches,
    ) -> Iterator[R]:
        """Yield what `compute` returns for each batch that `cut` makes of rows and a batch size.

        A batch that is too much is computed again in smaller ones, as are all after it. Raises
        LorakitError if a single row is too much.
        """
        batches = deque(cut(rows, self.rows))
        while batches:
            try:
                result = compute(batches[0])
            except torch.OutOfMemoryError as error:
                self.halve_(len(batches[0]), error)
                batches = deque(cut([row for batch in batches for row in batch], self.rows))
            else:
                batches.popleft()
                yield result

    def halve_(self, tried: int, error: torch.OutOfMemoryError) -> None:
        """Halve the batches, of which one of `tried` rows was too much.

        Raises LorakitError if that was a single row.
        """
        if min(self.rows, tried) <= 1:
            raise LorakitError(
                "memory does not suffice for a single record; give a smaller --max-length or "
                "--max-new-tokens, or another --device"
            ) from error
        self.rows = min(self.rows, tried) // 2
        self._note(f"out of memory: batches of at most {self.rows} records from here on")
