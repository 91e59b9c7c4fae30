"""A backward pass in a fixed order leaves PyTorch's settings as they were, however it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit.models.fixed_order import (
    _kernels,
    backward_pass,
    fixed_order_begins,
    fixed_order_ends,
)


def test_a_backward_pass_that_fails_leaves_pytorchs_settings_as_they_were() -> None:
    failing: Any = _Failing
    x = torch.ones(3, requires_grad=True)
    before = _kernels()
    with pytest.raises(torch.OutOfMemoryError), backward_pass():
        fixed_order_begins(failing.apply(fixed_order_ends(x)[0])).sum().backward()
    assert _kernels() == before
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        fixed_order_begins(fixed_order_ends(x)[0] * 2).sum().backward()
        assert _kernels() == (True, True, before[2])
    finally:
        torch.use_deterministic_algorithms(before[0])


class _Failing(torch.autograd.Function):
    """Runs out of memory in its backward pass, in which sums have a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        assert _kernels() == (True, False, False)
        raise torch.OutOfMemoryError
