"""How a base attends on a CPU: in float32, and row by row where rows are packed into one sequence.

On CPUs PyTorch's bfloat16 attention has a slow backward pass, and a mask that keeps packed rows
apart would cost as much as one row of their joint length. A packed row sees what the model's own
rule (causal, sliding window) lets it see of itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import transformers

BY_ROW = "sdpa_by_row"
_lengths: ContextVar[Sequence[int] | None] = ContextVar("lengths", default=None)


class RowMasks(NamedTuple):
    """What stands for the attention mask of packed rows: each one's length and mask.

    A mask is bool (1, 1, length, length), None where it is the causal one.
    """

    lengths: list[int]
    masks: list[torch.Tensor | None]


@contextlib.contextmanager
def packed(lengths: Sequence[int]) -> Iterator[None]:
    """Take every sequence given to a model inside the block for rows of these lengths."""
    token = _lengths.set(lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


def attend_by_row(model: Any) -> None:
    """Let a model that attends by PyTorch's own function do so in float32, and by row if packed."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(BY_ROW)


def _attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    plain = transformers.AttentionInterface()["sdpa"]
    wide = [tensor.float() for tensor in (query, key, value)]
    if isinstance(mask, RowMasks):
        rows = zip(*(tensor.split(mask.lengths, 2) for tensor in wide), strict=True)
        found = [
            plain(module, *row, own, **settings)[0]
            for row, own in zip(rows, mask.masks, strict=True)
        ]
        return torch.cat(found, 1).to(query.dtype), None
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    return plain(module, *wide, mask, **settings)[0].to(query.dtype), None


def _mask(**told: Any) -> Any:
    plain = transformers.AttentionMaskInterface()["sdpa"]
    lengths = _lengths.get()
    if lengths is None:
        return plain(**told)
    masks: list[torch.Tensor | None] = []
    start = 0
    for length in lengths:
        row = {"q_length": length, "kv_length": length, "q_offset": start, "kv_offset": start}
        own = plain(**{**told, **row, "allow_is_causal_skip": False})
        masks.append(None if _is_causal(own) else own)
        start += length
    return RowMasks(list(lengths), masks)


def _is_causal(mask: torch.Tensor) -> bool:
    return bool((mask == torch.ones_like(mask).tril()).all())


transformers.AttentionInterface.register(BY_ROW, _attention)
transformers.AttentionMaskInterface.register(BY_ROW, _mask)
