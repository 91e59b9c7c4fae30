"""Sums in a fixed order, for a part of the backward pass on a GPU, so that runs repeat their bytes.

The kernels of attention's backward pass add up as their parts end, unless PyTorch is told to
compute deterministically. Told so throughout, it would refuse operations that have no such kernel.
So it is told just there, by two functions that pass on what they are given:

    inputs = fixed_order_ends(query, key, value)     # backwards: what was begun ends here
    output = fixed_order_begins(attend(*inputs))     # backwards: from here on in a fixed order
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

# Without this, torch refuses products while it is to sum in a fixed order; it is Hopper's default.
_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_before: list[tuple[bool, bool, bool]] = []  # `_kernels` where a fixed order began


def allow_fixed_order() -> None:
    """Set what PyTorch asks for before it sums in a fixed order, if the user has not."""
    os.environ.setdefault(*_WORKSPACES)


def fixed_order_ends(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the inputs of what is to have a backward pass in a fixed order."""
    passed: tuple[torch.Tensor, ...] = _Ends.apply(*inputs)  # type: ignore[no-untyped-call]
    return passed


def fixed_order_begins(output: torch.Tensor) -> torch.Tensor:
    """Return the output of what is to have a backward pass in a fixed order."""
    passed: torch.Tensor = _Begins.apply(output)  # type: ignore[no-untyped-call]
    return passed


class _Begins(torch.autograd.Function):
    """Passes an output on; from its backward pass on, kernels sum in a fixed order."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        _before.append(_kernels())
        _set_kernels(deterministic=True, only_warn=False, fill=False)
        return grad


class _Ends(torch.autograd.Function):
    """Passes inputs on; its backward pass ends what `_Begins` began."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if _before:
            _set_kernels(*_before.pop())
        return grads


@contextlib.contextmanager
def fixed_order() -> Iterator[None]:
    """Inside the block, kernels sum in a fixed order."""
    kernels = _kernels()
    _set_kernels(deterministic=True, only_warn=False, fill=False)
    try:
        yield
    finally:
        _set_kernels(*kernels)


@contextlib.contextmanager
def backward_pass() -> Iterator[None]:
    """Inside the block, a backward pass runs; if it fails, PyTorch's settings are as before."""
    kernels = _kernels()
    try:
        yield
    finally:
        _before.clear()
        if _kernels() != kernels:
            _set_kernels(*kernels)


def _kernels() -> tuple[bool, bool, bool]:
    """Return whether kernels are to be deterministic, only warn, and fill what they allocate."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


def _set_kernels(deterministic: bool, only_warn: bool, fill: bool) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=only_warn)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
