"""The attention masks of rows that are packed into one sequence.

One mask that keeps packed rows apart would cost as much as a single row of their total length. So
inside `packed`, a model's mask is a list, of the model's own mask (causal, sliding window) for each
row, and attention is computed for each row alone (attention.py, gpu_attention.py):

    with packed([4, 2]):          # a sequence of six tokens holds a row of four and a row of two
        model(...)                # tokens 0-3 see tokens 0-3, tokens 4 and 5 see tokens 4 and 5
    model(...)                    # outside the block all six tokens are one row

How rows are packed is decided in batches.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import transformers

transformers_masks = transformers.AttentionMaskInterface()["sdpa"]
_lengths: ContextVar[Sequence[int] | None] = ContextVar("lengths", default=None)


@dataclass(frozen=True)
class RowMasks:
    """The attention mask of packed rows: the length and the mask of each row.

    A mask is bool (1, 1, length, length), or None if it is the causal one.
    """

    lengths: list[int]
    masks: list[torch.Tensor | None]
    device: torch.device

    @property
    def causal(self) -> bool:
        """Whether every row's mask is the causal one."""
        return all(mask is None for mask in self.masks)

    @functools.cached_property
    def ends(self) -> torch.Tensor:
        """Where each row ends in the sequence, after 0 for the first's start: (rows + 1,) int32."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32).to(
            self.device
        )

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """Where each token is in a batch of the rows, padded on the right: (tokens,) int64."""
        filled = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]
        return filled.flatten().nonzero()[:, 0].to(self.device)


@contextlib.contextmanager
def packed(lengths: Sequence[int]) -> Iterator[None]:
    """Inside the block, treat every sequence that a model reads as rows of these lengths."""
    token = _lengths.set(lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


def make_masks(**arguments: object) -> torch.Tensor | RowMasks | None:
    """Return the mask that transformers makes, or one for each packed row."""
    lengths = _lengths.get()
    if lengths is None:
        whole: torch.Tensor | None = transformers_masks(**arguments)
        return whole
    if len(lengths) == 1:
        own: torch.Tensor | None = transformers_masks(**arguments)
        device = torch.device(str(arguments["device"])) if own is None else own.device
        return RowMasks(list(lengths), [own], device)
    if sum(lengths) <= _tokens_at_once(arguments["device"]):
        together = transformers_masks(**{**arguments, "allow_is_causal_skip": False})
        if torch.equal(together[0, 0], _causal_rows(lengths, together.device)):
            return RowMasks(list(lengths), [None] * len(lengths), together.device)
    masks: list[torch.Tensor] = []
    start = 0
    for length in lengths:
        row = {"q_length": length, "kv_length": length, "q_offset": start, "kv_offset": start}
        masks.append(transformers_masks(**{**arguments, **row, "allow_is_causal_skip": False}))
        start += length
    causal = torch.stack([are_causal(mask) for mask in masks]).tolist()  # waits for a GPU once
    kept = [None if plain else mask for plain, mask in zip(causal, masks, strict=True)]
    return RowMasks(list(lengths), kept, masks[0].device)


def _tokens_at_once(device: object) -> int:
    """Return of how many tokens one mask is made, to see whether all rows are causal.

    A GPU would wait for the masks of rows one by one.
    """
    return 8192 if torch.device(str(device)).type == "cuda" else 0


def _causal_rows(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the mask of packed rows that each are causal: bool (tokens, tokens)."""
    numbers = [[number] * length for number, length in enumerate(lengths)]
    rows = torch.tensor(list(itertools.chain(*numbers)), device=device)
    return (rows[:, None] == rows).tril()


def are_causal(mask: torch.Tensor) -> torch.Tensor:
    """Return whether bool masks (…, length, length) all are the causal one: () bool."""
    return (mask == torch.ones_like(mask).tril()).all()
