"""Importance of LoRA parameters, and what the least important are reset to.

Adaptive LoRA merge, section 3.2 and Algorithm 1. After an optimiser step the least important
parameters of each group (groups.py), or whole A/B pairs of little importance, are reset; they stay
trainable. Weights are (…, rows, columns), where leading dimensions index matrices of the same
shape. To add a criterion or a value to reset to, write a function and add a line to its table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Generator, Tensor

BETA = 0.85  # of both moving averages of the gradient score (PLATON's and AdaLoRA's choice)


class Evidence(NamedTuple):
    """What a criterion reads besides the weights; what it does not use may be None.

    `norms` (…, 1, columns): the L2 norm, over all tokens of the validation set, of each feature of
    the matrix's input, which is x for A and A·x for B. `averages`: the sensitivity and the
    uncertainty of `smooth_`, shaped as the weights.
    """

    norms: Tensor | None = None
    averages: tuple[Tensor, Tensor] | None = None


def input_importance(weight: Tensor, evidence: Evidence) -> Tensor:
    """Return I(W_jk) = |W_jk| · ‖x_k‖₂ (section 3.2; Wanda, Sun et al., 2024)."""
    if evidence.norms is None:
        raise TypeError("input importance needs the norms of the inputs")
    return weight.abs() * evidence.norms


def gradient_importance(weight: Tensor, evidence: Evidence) -> Tensor:
    """Return Ī·U, the smoothed sensitivity times its uncertainty (PLATON, Zhang et al., 2022)."""
    if evidence.averages is None:
        raise TypeError("gradient importance needs the moving averages of smooth_")
    sensitivity, uncertainty = evidence.averages
    return sensitivity * uncertainty


def magnitude_importance(weight: Tensor, evidence: Evidence) -> Tensor:
    """Return |W_jk|, whatever the inputs (the control condition)."""
    return weight.abs()


class Criterion(NamedTuple):
    """An importance score, and what it reads besides the weights, which is collected for it.

    `knows_scale` says that it is the same for parameters into which their adapter's scale is
    folded, as w·∂L/∂w is; others are multiplied by the scale where adapters are compared.
    """

    score: Callable[[Tensor, Evidence], Tensor]
    reads: Literal["nothing", "norms", "averages"] = "nothing"
    knows_scale: bool = False


CRITERIA: dict[str, Criterion] = {
    "input": Criterion(input_importance, reads="norms"),
    "gradient": Criterion(gradient_importance, reads="averages", knows_scale=True),
    "magnitude": Criterion(magnitude_importance),
}


def smooth_(sensitivity: Tensor, uncertainty: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Update both moving averages, which start at zero, by one step in place.

    I = |w·∂L/∂w|;  Ī ← β·Ī + (1-β)·I;  U ← β·U + (1-β)·|I - Ī|, with the new Ī.
    """
    now = (weight * gradient).abs()
    sensitivity.lerp_(now, 1 - BETA)
    uncertainty.lerp_((now - sensitivity).abs(), 1 - BETA)


def zero_value(weight: Tensor, start: Tensor, is_b: bool, draws: Generator) -> Tensor:
    """Return zeros."""
    return weight.new_zeros(weight.shape)


def init_value(weight: Tensor, start: Tensor, is_b: bool, draws: Generator) -> Tensor:
    """Return the values the parameters had when the merge began."""
    return start


def reinit_value(weight: Tensor, start: Tensor, is_b: bool, draws: Generator) -> Tensor:
    """Return a fresh LoRA initialisation: B zero, A uniform within ±1/√d_in (Kaiming, a = √5)."""
    if is_b:
        return weight.new_zeros(weight.shape)
    fresh = weight.new_empty(weight.shape, device=draws.device)
    bound = 1 / math.sqrt(weight.shape[-1])
    return fresh.uniform_(-bound, bound, generator=draws).to(weight.device)


class ResetValue(NamedTuple):
    """What parameters are reset to, and whether it is their value at the start, which is kept."""

    of: Callable[[Tensor, Tensor, bool, Generator], Tensor]
    reads_start: bool = False


VALUES: dict[str, ResetValue] = {
    "zero": ResetValue(zero_value),
    "init": ResetValue(init_value, reads_start=True),
    "reinit": ResetValue(reinit_value),
}


def prune_count(ratio: Decimal, size: int) -> int:
    """Return floor(ratio · size), exact because the ratio is the decimal the user wrote."""
    return int(ratio * size)


def least_important(importance: Tensor, count: int) -> Tensor:
    """Return a mask of exactly `count` least important parameters of each matrix, ties or not."""
    return least(importance.flatten(-2), count).view_as(importance)


def least(importance: Tensor, count: int) -> Tensor:
    """Return a mask of exactly `count` least values along the last dimension, ties or not."""
    indices = importance.topk(count, dim=-1, largest=False, sorted=False).indices
    return importance.new_zeros(importance.shape).scatter_(-1, indices, 1).bool()


def mean_importance(of_a: Tensor, of_b: Tensor) -> Tensor:
    """Return the mean importance over all parameters of each A/B pair, (…,) for (…, r, d)."""
    total = of_a.sum((-2, -1)) + of_b.sum((-2, -1))
    return total / (math.prod(of_a.shape[-2:]) + math.prod(of_b.shape[-2:]))
