"""Cross-entropy in float32 of logits in any dtype, a few rows at a time.

A vocabulary is wide: what PyTorch's own function keeps and makes of all rows in float32 at once,
several copies of the logits, is here made of some rows at a time, and only the logits are kept.
"""

from __future__ import annotations

from typing import Any

import torch

_AT_ONCE = 1 << 20  # logits in float32 at a time


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, ignored: int) -> torch.Tensor:
    """Return −log softmax(logits)[label] of each row, 0 where the label is `ignored`.

    logits (rows, vocabulary) in any floating dtype; labels (rows,) int64; the result (rows,)
    float32.
    """
    found: torch.Tensor = _CrossEntropy.apply(logits, labels, ignored)  # type: ignore[no-untyped-call]
    return found


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> torch.Tensor:
        counted = labels != ignored
        places = labels.where(counted, 0)[:, None]
        sums = torch.cat([part.float().logsumexp(1) for part in _parts(logits)])
        ctx.save_for_backward(logits, places, counted, sums)
        return (sums - logits.gather(1, places)[:, 0].float()).where(counted, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, places, counted, sums = ctx.saved_tensors
        due = (grad * counted)[:, None]
        found = torch.empty_like(logits)
        start = 0
        for part in _parts(logits):
            rows = slice(start, start + len(part))
            own = (part.float() - sums[rows, None]).exp_().mul_(due[rows])
            own.scatter_add_(1, places[rows], -due[rows])
            found[rows] = own
            start += len(part)
        return found, None, None


def _parts(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = logits.split(max(1, _AT_ONCE // logits.shape[1]))
    return parts
