"""Whether two ways to compute something give the same: values and gradients, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
Tensors = Sequence[torch.Tensor]
# What a family's code can raise where it is given what it does not expect.
_REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # some families widen half precision


def compute_the_same(
    one: Callable[..., Tensors], other: Callable[..., Tensors], given: Tensors
) -> bool:
    """Return whether both give the same tensors for some, and gradients with respect to them.

    False, too, where one of them refuses what it is given.
    """
    try:
        results = [_values_and_gradients(compute, given) for compute in (one, other)]
    except _REFUSALS:
        return False
    pairs = zip(*results, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@torch.enable_grad()
def _values_and_gradients(compute: Callable[..., Tensors], given: Tensors) -> list[torch.Tensor]:
    inputs = [tensor.detach().clone().requires_grad_(True) for tensor in given]
    values = compute(*inputs)
    draw = torch.Generator().manual_seed(1)
    due = [torch.randn(value.shape, generator=draw).to(value.dtype) for value in values]
    return [*values, *torch.autograd.grad(values, inputs, due)]


def passing(candidates: Iterable[tuple[Hashable, T]], trial: Callable[[T], bool]) -> Iterator[T]:
    """Yield the candidates that pass a trial, which is made for the first of each kind."""
    passed: dict[Hashable, bool] = {}
    for kind, candidate in candidates:
        if kind not in passed:
            passed[kind] = trial(candidate)
        if passed[kind]:
            yield candidate
