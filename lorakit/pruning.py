"""Pruning of LoRA parameters by importance (adaptive LoRA merge, section 3.2 and Algorithm 1).

A group is one matrix, A or B, of one source adapter at one projection of one layer. After every
optimiser step the least important parameters of each group become zero; they stay trainable.
To add a criterion: one function of a weight and its inputs' norms, and a line in CRITERIA.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def input_importance(weight: Tensor, norms: Tensor) -> Tensor:
    """Return |W_jk| · ‖x_k‖₂ (section 3.2; Wanda, Sun et al., 2024).

    `weight` is (d_out, d_in), `norms` (d_in,): the L2 norm, over all tokens of the validation set,
    of each feature of the matrix's input, which is x for A and A·x for B.
    """
    return weight.abs() * norms


def magnitude_importance(weight: Tensor, norms: Tensor) -> Tensor:
    """Return |W_jk|, whatever the inputs (the control)."""
    return weight.abs()


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "input": input_importance,
    "magnitude": magnitude_importance,
}


def prune_count(ratio: Decimal, size: int) -> int:
    """Return floor(ratio · size), with the ratio as the exact decimal it was written as."""
    return int(ratio * size)


def prune_(weight: Tensor, importance: Tensor, count: int) -> None:
    """Set the `count` least important parameters of `weight` to zero, in place.

    Exactly `count` are chosen, ties or not, in each group: `weight` and `importance` are (…, rows,
    columns), any leading dimensions number groups of the same shape.
    """
    flat = importance.flatten(-2)
    least = flat.topk(count, dim=-1, largest=False, sorted=False).indices
    chosen = flat.new_zeros(flat.shape).scatter_(-1, least, 1).bool()
    weight.masked_fill_(chosen.view_as(importance), 0)
