"""Root-mean-square norms by fewer operations than transformers', and less that they store.

transformers writes the norm out in operations that each read and write all hidden states, and so
does its backward pass: on a GPU a sixth of a training step. There, PyTorch's one kernel computes
it, and in training, in half precision, one kernel each way; on a CPU, in training, one function, to
the same bits. Families' norms differ (Gemma adds one to the weight), so those are replaced that a
trial shows to compute the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from types import ModuleType
from typing import Any

import torch

from lorakit.models.architecture import Forward, Model, other_forwards
from lorakit.models.gpu_kernels import kernels_for
from lorakit.models.trials import compute_the_same, passing

_EPSILONS = ("variance_epsilon", "eps", "epsilon")  # what families call it
_OWN_AND_INPUT = 2  # parameters of a norm's forward; gated ones take a third


def fuse_norms_(model: Model) -> None:
    """Have the norms of a model computed by PyTorch's kernel where that gives the same."""
    for norm in fusible_norms(model):
        norm.forward = functools.partial(_fused, norm, _epsilon_of(norm))


@contextlib.contextmanager
def fused_norms(model: Model) -> Iterator[None]:
    """Inside the block, the norms of a model are one function where gradients are due.

    Not on a GPU that does not compute it as one kernel.
    """
    norms = [n for n in lean_norms(model) if _is_faster(n.get_parameter("weight"))]
    forwards = {n: functools.partial(_in_training, n, _epsilon_of(n), n.forward) for n in norms}
    with other_forwards(forwards):
        yield


def _is_faster(weight: torch.nn.Parameter) -> bool:
    """Return whether a norm with this weight is faster as one function."""
    return weight.device.type == "cpu" or kernels_for(weight) is not None


def fusible_norms(model: Model) -> Iterator[torch.nn.Module]:
    """Yield the norms that PyTorch's kernel computes; the model may be without weights."""
    return passing(_plain_norms(model), _computes_the_same)


def lean_norms(model: Model) -> Iterator[torch.nn.Module]:
    """Yield the norms that one function computes in training; the model may be without weights."""
    plain = _plain_norms(model)
    return passing(((k, n) for k, n in plain if not _is_replaced(n)), _trains_the_same)


def _is_replaced(norm: torch.nn.Module) -> bool:
    """Return whether something other than `fuse_norms_` has replaced a norm's forward."""
    forward = vars(norm).get("forward")
    return forward is not None and getattr(forward, "func", None) is not _fused


def _plain_norms(model: Model) -> Iterator[tuple[Hashable, torch.nn.Module]]:
    """Yield the norms that hold a weight alone, after what those of a kind have in common."""
    for module in model.modules():
        if "RMSNorm" not in type(module).__name__ or hasattr(module, "_hf_hook"):
            continue  # accelerate's hook, which moves inputs between devices, is in `forward`
        weight, epsilon = getattr(module, "weight", None), _epsilon_of(module)
        takes_more = len(inspect.signature(type(module).forward).parameters) > _OWN_AND_INPUT
        if not isinstance(weight, torch.nn.Parameter) or epsilon is None or takes_more:
            continue
        if hasattr(weight, "device_mesh"):  # a part of it: the base is sharded
            continue
        yield (type(module), weight.shape, weight.dtype, epsilon), module


def _epsilon_of(module: torch.nn.Module) -> float | None:
    """Return what a norm adds to the mean of squares, None for one that does not tell."""
    values = (getattr(module, name, None) for name in _EPSILONS)
    return next((value for value in values if isinstance(value, float)), None)


def _fused(norm: torch.nn.Module, epsilon: float | None, x: torch.Tensor) -> torch.Tensor:
    """Return x / √(mean of x² + ε), rounded to its dtype, times the weight, as Llama has it."""
    weight = norm.get_parameter("weight")
    return torch.nn.functional.rms_norm(x, weight.shape, None, epsilon) * weight


def _in_training(
    norm: torch.nn.Module, epsilon: float | None, plain: Forward, x: torch.Tensor
) -> torch.Tensor:
    """Return what `_fused` does, on a CPU to the bit of what transformers does."""
    weight = norm.get_parameter("weight")
    kernels = _kernels_for(x, weight)
    due = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
    if not due or (kernels is None and x.device.type != "cpu"):
        return plain(x)
    normed: torch.Tensor = _Norm.apply(x, weight, epsilon, kernels)  # type: ignore[no-untyped-call]
    return normed


def _kernels_for(x: torch.Tensor, weight: torch.Tensor) -> ModuleType | None:
    kernels = kernels_for(x) if x.is_contiguous() and x.dtype == weight.dtype else None
    return None if kernels is None or x.shape[-1] > kernels.WIDEST_NORM else kernels


class _Norm(torch.autograd.Function):
    """w·x·r with r = 1 / √(mean of x² + ε); its gradient is r·(g·w) − x·r³·(sum of g·w·x) / d."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, kernels: ModuleType | None
    ) -> torch.Tensor:
        ctx.kernels = kernels
        if kernels is not None:
            normed, root = kernels.norm(x, weight, epsilon)
            ctx.save_for_backward(x, weight, root)
            return normed  # type: ignore[no-any-return]
        wide = x.float()
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, root)
        return weight * (wide * root).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, root = ctx.saved_tensors
        if ctx.kernels is not None:
            return ctx.kernels.norm_backward(grad, x, weight, root), None, None, None
        wide, weighted = x.float(), (grad * weight).float()
        along = (weighted * wide).sum(-1, keepdim=True) * root.pow(3) / x.shape[-1]
        return (weighted * root).sub_(along * wide).to(x.dtype), None, None, None


@torch.no_grad()
def _computes_the_same(module: torch.nn.Module) -> bool:
    """Return whether a norm gives what the kernel does, with random weights and to the bit."""
    norm, x = _copy_and_input(module)
    try:
        expected, fused = norm(x), _fused(norm, _epsilon_of(module), x)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return expected.dtype == fused.dtype and torch.equal(fused, expected)


def _trains_the_same(module: torch.nn.Module) -> bool:
    """Return whether a norm gives what `_Norm` does, with its gradient."""
    (norm, x), epsilon = _copy_and_input(module), _epsilon_of(module)
    weight = norm.get_parameter("weight").requires_grad_(False)
    one_function: Callable[..., torch.Tensor] = _Norm.apply
    return compute_the_same(
        lambda x: [type(norm).forward(norm, x)],
        lambda x: [one_function(x, weight, epsilon, None)],
        [x],
    )


@torch.no_grad()
def _copy_and_input(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a norm with random weights, and what it may be given, small and large."""
    norm = copy.deepcopy(module).to_empty(device="cpu")
    weight = norm.get_parameter("weight")
    draw = torch.Generator().manual_seed(0)
    weight.normal_(generator=draw)
    x = torch.randn(3, *weight.shape, generator=draw)
    return norm, (x * torch.tensor([1e-3, 1.0, 30.0])[:, None]).to(weight.dtype)
