"""LoRA's forward and backward pass as one function, which keeps little for the backward pass.

PEFT's layers keep a float32 copy of their input; here the input stays in its own dtype, a tensor
that neighbouring projections share, and the dropout's mask takes a byte a value. On a CPU bytes
multiply several times faster than booleans, and drawing 16 random bits a value is several times
faster than torch's own dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.functional import linear

from lorakit.models.lora import ADAPTER, PeftLayer, factors, rank_scales

_Forward = Callable[..., torch.Tensor]


@contextlib.contextmanager
def fused_forward(layers: Mapping[str, PeftLayer]) -> Iterator[None]:
    """Let PEFT's layers compute W0·x + B·(s·A·x) as one function wherever gradients are wanted."""
    try:
        for layer in layers.values():
            layer.forward = _fused(layer)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


@contextlib.contextmanager
def switch_dropout(layers: Mapping[str, PeftLayer], *, on: bool) -> Iterator[None]:
    """Switch the layers' dropout on or off inside the block."""
    before = [layer.lora_dropout.training for layer in layers.values()]
    for layer in layers.values():
        layer.lora_dropout.train(on)
    try:
        yield
    finally:
        for layer, was_on in zip(layers.values(), before, strict=True):
            layer.lora_dropout.train(was_on)


def _fused(layer: PeftLayer) -> _Forward:
    whole, base_layer, dropper = layer.forward, layer.get_base_layer(), layer.lora_dropout[ADAPTER]
    a, b = factors(layer)
    scales = rank_scales(layer)

    def forward(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            plain_result: torch.Tensor = whole(x, *rest, **more)
            return plain_result
        share = float(getattr(dropper, "p", 0.0)) if dropper.training else 0.0
        from_base = base_layer(x, *rest, **more)
        output: torch.Tensor = _LoraSum.apply(from_base, x, a, b, scales, share)  # type: ignore[no-untyped-call]
        return output

    return forward


class _LoraSum(torch.autograd.Function):
    """W0·x + B·(s·A·dropout(x)), computed in the dtype of A and B, in the dtype of W0·x."""

    @staticmethod
    def forward(
        ctx: Any,
        from_base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scales: torch.Tensor,
        share: float,
    ) -> torch.Tensor:
        keep_mask = mask(x, share) if share else None
        scales = scales / (1 - share)
        low = linear(_masked(x.to(a.dtype), keep_mask), a) * scales
        ctx.save_for_backward(x, a, b, scales, low, keep_mask)
        return (from_base + linear(low, b)).to(from_base.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, scales, low, keep_mask = ctx.saved_tensors
        wide = grad.to(a.dtype).flatten(0, -2)
        low_grad = (wide @ b) * scales
        x_grad = None
        if ctx.needs_input_grad[1]:
            x_grad = _masked((low_grad @ a).view_as(x), keep_mask).to(x.dtype)
        a_grad = low_grad.t() @ _masked(x.to(a.dtype), keep_mask).flatten(0, -2)
        b_grad = wide.t() @ low.flatten(0, -2)
        return grad, x_grad, a_grad, b_grad, None, None


def mask(x: torch.Tensor, share: float) -> torch.Tensor:
    """Draw which values of `x` dropout keeps: bytes, 1 or 0, in the shape of `x`."""
    return _mask_of_bits(x, share) if x.device.type == "cpu" else _plain_mask(x, share)


def _plain_mask(x: torch.Tensor, share: float) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - share)


def _mask_of_bits(x: torch.Tensor, share: float) -> torch.Tensor:
    """Draw 64 bits for every four values, 16 for each.

    The share dropped is `share` to the nearest 1/65,536, and never all of it.
    """
    lowest = -(2**15)
    first_kept = min(lowest + round(share * 2**16), -lowest - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return bits.ge_(first_kept).to(torch.uint8)


def _masked(values: torch.Tensor, keep_mask: torch.Tensor | None) -> torch.Tensor:
    return values if keep_mask is None else values * keep_mask
