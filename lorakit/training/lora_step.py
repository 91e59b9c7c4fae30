"""LoRA's forward and backward pass as one function, which stores little for the backward pass.

PEFT's layers store a float32 copy of their input; here the input stays in its own dtype, as a
tensor that neighbouring projections share, as they do the float32 copy that they compute with.
Kernels of a GPU need no such copy. The dropout mask takes one byte per value. On a CPU, bytes
multiply several times faster than booleans, and drawing 16 random bits per value is several times
faster than torch's own dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple, overload

import torch
from torch.nn.functional import linear

from lorakit.models.architecture import Forward, Model, at_the_head, other_forwards
from lorakit.models.gpu_kernels import kernels_for
from lorakit.models.lora import ADAPTER, PeftLayer, factors, rank_scales
from lorakit.models.norms import fused_norms
from lorakit.models.rotary import fused_rotary
from lorakit.models.swiglu import fused_swiglu


@contextlib.contextmanager
def fused_forward(layers: Mapping[str, PeftLayer], copies: _Copies | None = None) -> Iterator[None]:
    """Inside the block, PEFT's layers compute W0·x + B·(s·A·x) as one function.

    Without gradients they still compute as PEFT does, as do layers whose A and B are frozen. They
    share `copies` of their inputs.
    """
    copies = copies or _Copies()
    trained = [layer for layer in layers.values() if factors(layer)[0].requires_grad]
    with other_forwards({layer: _fused(layer, copies) for layer in trained}):
        yield


@contextlib.contextmanager
def lean_passes(model: Model, layers: Mapping[str, PeftLayer]) -> Iterator[None]:
    """Inside the block, a model and LoRA's layers on it take fewer operations, and store less."""
    copies = _Copies()
    with (
        fused_rotary(model),
        fused_norms(model),
        fused_swiglu(model),
        fused_forward(layers, copies),
        at_the_head(model, copies.forget),
    ):
        yield


@contextlib.contextmanager
def switch_dropout(layers: Mapping[str, PeftLayer], *, on: bool) -> Iterator[None]:
    """Inside the block, switch the layers' dropout on or off."""
    before = [layer.lora_dropout.training for layer in layers.values()]
    for layer in layers.values():
        layer.lora_dropout.train(on)
    try:
        yield
    finally:
        for layer, was_on in zip(layers.values(), before, strict=True):
            layer.lora_dropout.train(was_on)


class _Copy(NamedTuple):
    """An input as it was at a version, without its graph, and its copy."""

    of: torch.Tensor
    version: int
    copy: torch.Tensor

    def serves(self, x: torch.Tensor, dtype: torch.dtype) -> bool:
        """Return whether it is of the same memory, unchanged since, and in this dtype."""
        same = self.of.data_ptr() == x.data_ptr() and self.version == x._version
        alike = self.of.shape == x.shape and self.of.stride() == x.stride()
        return same and alike and self.copy.dtype == dtype


class _Copies:
    """Copies of inputs in another dtype, of which the latest is kept for the next projection."""

    def __init__(self) -> None:
        self._latest: _Copy | None = None

    def of(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return x in a dtype."""
        if x.dtype == dtype:
            return x
        latest = self._latest
        if latest is None or not latest.serves(x, dtype):
            latest = self._latest = None  # its memory serves the new one
            latest = self._latest = _Copy(x.detach(), x._version, x.to(dtype))
        return latest.copy

    def forget(self) -> None:
        """Keep none."""
        self._latest = None


def _fused(layer: PeftLayer, copies: _Copies) -> Forward:
    """Return the fused forward of a layer, which without gradients is PEFT's own."""
    pefts_forward, base_layer = layer.forward, layer.get_base_layer()
    dropout = layer.lora_dropout[ADAPTER]
    a, b = factors(layer)
    scales = rank_scales(layer)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            plain_result: torch.Tensor = pefts_forward(x, *args, **kwargs)
            return plain_result
        share = float(getattr(dropout, "p", 0.0)) if dropout.training else 0.0
        kernels = _kernels_for(x, a) if _is_plain(base_layer) else None
        if kernels is not None:
            weights = base_layer.weight, base_layer.bias, a, b
            whole: torch.Tensor = _LoraLinear.apply(x, *weights, scales, share, kernels)  # type: ignore[no-untyped-call]
            return whole
        from_base = base_layer(x, *args, **kwargs)
        output: torch.Tensor = _LoraSum.apply(from_base, x, a, b, scales, share, copies)  # type: ignore[no-untyped-call]
        return output

    return forward


class _LoraSum(torch.autograd.Function):
    """W0·x + B·(s·A·dropout(x)), computed in the dtype of A and B, returned in that of W0·x."""

    @staticmethod
    def forward(
        ctx: Any,
        from_base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scales: torch.Tensor,
        share: float,
        copies: _Copies,
    ) -> torch.Tensor:
        keep_mask, scales = _dropout(x, scales, share)
        low = linear(_masked(copies.of(x, a.dtype), keep_mask), a) * scales
        ctx.save_for_backward(x, a, b, scales, low, keep_mask)
        ctx.copies = copies
        return torch.add(from_base, linear(low, b), out=torch.empty_like(from_base))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, scales, low, keep_mask = ctx.saved_tensors
        wide = grad.to(a.dtype).flatten(0, -2)
        low_grad = (wide @ b) * scales
        x_grad = None
        if ctx.needs_input_grad[1]:
            x_grad = _masked((low_grad @ a).view_as(x), keep_mask).to(x.dtype)
        given = _masked(ctx.copies.of(x, a.dtype), keep_mask)
        a_grad = low_grad.t() @ given.flatten(0, -2)
        b_grad = wide.t() @ low.flatten(0, -2)
        return grad, x_grad, a_grad, b_grad, None, None, None


class _LoraLinear(torch.autograd.Function):
    """W0·x + c + B·(s·A·dropout(x)) by a GPU's kernels, which convert and copy nothing.

    W0, (d_out, d_in), and c are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scales: torch.Tensor,
        share: float,
        kernels: ModuleType,
    ) -> torch.Tensor:
        keep_mask, scales = _dropout(x, scales, share)
        summed = linear(x, weight, bias)
        low = kernels.down(_rows(x), a, scales, _rows(keep_mask))
        rows = _rows(summed)
        kernels.up(low, b.t(), base=rows, dtype=summed.dtype, out=rows)
        ctx.save_for_backward(x, weight, a, b, scales, low, keep_mask)
        ctx.kernels = kernels
        return rows.view_as(summed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, scales, low, keep_mask = ctx.saved_tensors
        kernels, due, mask = ctx.kernels, _rows(grad), _rows(keep_mask)
        low_grad = kernels.down(due, b.t(), scales, None)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = due @ weight
            kernels.up(low_grad, a, base=x_grad, mask=mask, dtype=x.dtype, out=x_grad)
            x_grad = x_grad.view_as(x)
        a_grad, b_grad = kernels.factor_gradients(_rows(x), low_grad, due, low, mask)
        return x_grad, None, None, a_grad, b_grad, None, None, None


def _is_plain(base_layer: torch.nn.Module) -> bool:
    """Return whether a projection is a frozen linear layer, which computes as its class does."""
    return (
        type(base_layer) is torch.nn.Linear
        and "forward" not in vars(base_layer)
        and not any(parameter.requires_grad for parameter in base_layer.parameters())
        and not base_layer._forward_hooks
        and not base_layer._forward_pre_hooks
    )


def _kernels_for(x: torch.Tensor, a: torch.Tensor) -> ModuleType | None:
    kernels = kernels_for(x) if a.dtype == torch.float32 else None
    return None if kernels is None or len(a) > kernels.HIGHEST_RANK else kernels


@overload
def _rows(values: torch.Tensor) -> torch.Tensor: ...
@overload
def _rows(values: None) -> None: ...
def _rows(values: torch.Tensor | None) -> torch.Tensor | None:
    """Return values as contiguous rows, one for each token."""
    return None if values is None else values.reshape(-1, values.shape[-1]).contiguous()


def _dropout(
    x: torch.Tensor, scales: torch.Tensor, share: float
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the mask that drops a share of x, if any, and the scales that make up for it."""
    return (dropout_mask(x, share), scales / (1 - share)) if share else (None, scales)


def dropout_mask(x: torch.Tensor, share: float) -> torch.Tensor:
    """Draw the values of `x` that dropout keeps, as bytes: 1 to keep, 0 to drop."""
    return _mask_of_bits(x, share) if x.device.type == "cpu" else _plain_mask(x, share)


def _plain_mask(x: torch.Tensor, share: float) -> torch.Tensor:
    """Draw the mask by torch's own Bernoulli draws."""
    return torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - share)


def _mask_of_bits(x: torch.Tensor, share: float) -> torch.Tensor:
    """Draw the mask from random bits, 64 for every four values.

    The share dropped is `share` rounded to 1/65,536, and never 1.
    """
    lowest = -(2**15)
    first_kept = min(lowest + round(share * 2**16), -lowest - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return bits.ge_(first_kept).to(torch.uint8)


def _masked(values: torch.Tensor, keep_mask: torch.Tensor | None) -> torch.Tensor:
    return values if keep_mask is None else values * keep_mask
