"""Gated MLPs that store a third less for the backward pass: silu(gate)·up as one function.

PyTorch stores silu(gate), which the product reads, beside gate and up; here it is computed again in
the backward pass, to the same bits, on a GPU by one kernel each way. Families' MLPs differ, so
those are replaced that a trial shows to compute down(silu(gate(x))·up(x)).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Hashable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import silu

from lorakit.models.architecture import Model, other_forwards
from lorakit.models.gpu_kernels import kernels_for
from lorakit.models.trials import DTYPES, compute_the_same, passing

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # what families call them
_ACTIVATION = "act_fn"
_Mlp = torch.nn.Module


@contextlib.contextmanager
def fused_swiglu(model: Model) -> Iterator[None]:
    """Inside the block, a model's gated MLPs store only what their activation reads."""
    with other_forwards({mlp: functools.partial(_fused, mlp) for mlp in fusible_mlps(model)}):
        yield


def fusible_mlps(model: Model) -> Iterator[_Mlp]:
    """Yield the MLPs that are computed in another way; the model may be without weights."""
    return passing(((_kind_of(mlp), mlp) for mlp in _gated_mlps(model)), _computes_the_same)


def _gated_mlps(model: Model) -> Iterator[_Mlp]:
    """Yield the modules with the parts of a gated MLP."""
    for module in model.modules():
        if not all(hasattr(module, name) for name in (*_PROJECTIONS, _ACTIVATION)):
            continue
        if hasattr(module, "_hf_hook") or "forward" in vars(module):
            continue  # accelerate's hook, which moves inputs between devices, is in `forward`
        yield module


def _kind_of(mlp: _Mlp) -> Hashable:
    """Return what MLPs that compute alike have in common: the numbers that they hold, too."""
    numbers = {name: value for name, value in vars(mlp).items() if isinstance(value, int | float)}
    return type(mlp), type(getattr(mlp, _ACTIVATION)), frozenset(numbers.items())


def _fused(mlp: _Mlp, x: torch.Tensor) -> torch.Tensor:
    """Return down(silu(gate(x))·up(x))."""
    gate, up, down = (getattr(mlp, name) for name in _PROJECTIONS)
    product: torch.Tensor = _SwiGlu.apply(gate(x), up(x))  # type: ignore[no-untyped-call]
    passed: torch.Tensor = down(product)
    return passed


class _SwiGlu(torch.autograd.Function):
    """silu(gate)·up, whose first factor is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels = _kernels_for(gate, up)
        if kernels is not None:
            product: torch.Tensor = kernels.swiglu(gate, up)
            return product
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        if ctx.kernels is not None:
            grads: tuple[torch.Tensor, torch.Tensor] = ctx.kernels.swiglu_backward(grad, gate, up)
            return grads
        up_grad = silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), up_grad


def _kernels_for(gate: torch.Tensor, up: torch.Tensor) -> ModuleType | None:
    return kernels_for(gate) if gate.is_contiguous() and up.is_contiguous() else None


def _computes_the_same(mlp: _Mlp) -> bool:
    """Return whether an MLP with a few weights gives what `_fused` does, with its gradient.

    Inputs are small and large, as some families bound what the gate lets through. An MLP that has
    weights of another kind does not.
    """
    if mlp._parameters or mlp._buffers or set(mlp._modules) - {*_PROJECTIONS, _ACTIVATION}:
        return False
    width, inner, draw = 4, 6, torch.Generator().manual_seed(0)
    sizes = dict.fromkeys(_PROJECTIONS[:2], (width, inner)) | {_PROJECTIONS[2]: (inner, width)}
    x = torch.randn(3, 5, width, generator=draw) * torch.tensor([1e-3, 1.0, 30.0])[:, None, None]

    def same(dtype: torch.dtype) -> bool:
        small = copy.copy(mlp)
        small._modules = dict(mlp._modules)
        for name, size in sizes.items():
            linear = torch.nn.Linear(*size, bias=False, device="cpu", dtype=torch.float32)
            torch.nn.init.normal_(linear.weight, generator=draw)
            small._modules[name] = linear.to(dtype).requires_grad_(False)
        ways = (lambda x: [type(mlp).forward(small, x)], lambda x: [_fused(small, x)])
        return compute_the_same(*ways, [x.to(dtype)])

    return all(map(same, DTYPES))
