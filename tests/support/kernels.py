"""What triton_kernels.py computes, by PyTorch's operations: on any device, rounded alike."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

WIDEST_NORM = 16_384
HIGHEST_RANK = 128
Tensor = torch.Tensor


def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * (wide * root).to(x.dtype), root.flatten()


def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, root: Tensor) -> Tensor:
    wide, weighted = x.float(), (grad * weight).float()
    root = root.view(*x.shape[:-1], 1)
    along = (weighted * wide).sum(-1, keepdim=True) * root.pow(3) / x.shape[-1]
    return (weighted * root - along * wide).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), silu(gate) * grad


def turn(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    (cos, sin), (first, second) = (cos[:, :, None], sin[:, :, None]), x.chunk(2, -1)
    of_first, of_second = sin.chunk(2, -1)
    if back:
        return x * cos + torch.cat([second * of_second, first * -of_first], -1)
    return x * cos + torch.cat([second * -of_first, first * of_second], -1)


def down(x: Tensor, weight: Tensor, scales: Tensor, mask: Tensor | None) -> Tensor:
    return _kept(x.float(), mask) @ weight.t() * scales


def up(
    low: Tensor,
    weight: Tensor,
    *,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    total = _kept(low @ weight, mask)
    summed = (total if base is None else total + base.float()).to(dtype)
    return summed if out is None else out.copy_(summed)


def factor_gradients(
    x: Tensor, low_grad: Tensor, grad: Tensor, low: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return low_grad.t() @ _kept(x.float(), mask), grad.float().t() @ low


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values * mask
