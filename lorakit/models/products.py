"""Products with a base's weights on a CPU, by oneDNN's kernels.

PyTorch multiplies float32 matrices by MKL, which does not use what processors of other makers can
do (AVX-512 on AMD's), and which rearranges the weights at every call: with few tokens that takes
as long as the product. oneDNN, which PyTorch has on board for other number formats, is faster with
few tokens and many; results differ from MKL's by rounding. Which products are large enough to gain
was measured on such a processor: small ones pay for the call. While tokens are decoded, weights are
kept in the order in which oneDNN reads them (packed.py).

oneDNN writes a program for each shape, and keeps a thousand of them: half a megabyte each where
tokens are few. So they are filled up to one of few numbers, with tokens of zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import linear, pad

from lorakit.models.architecture import Model

_Arrange = Callable[[torch.Tensor], torch.Tensor]
LARGE = 1 << 18  # weights from which a product with a single token gains
_MUCH = 1 << 24  # multiplications from which any does
# Up to so many tokens, their number is rounded up to a multiple of this; larger programs are small.
_STEPS = {1: 1, 64: 4, 128: 8, 256: 16, 512: 32}


def speed_up_products_(model: Model) -> None:
    """Have the linear layers of a model multiply by oneDNN where that is faster: on some CPUs."""
    for layer in fast_layers(model):
        layer.forward = functools.partial(multiply, layer)


def fast_layers(model: Model) -> Iterator[Any]:
    """Yield the linear layers of a model that multiply faster by oneDNN here."""
    if is_faster_here():
        yield from filter(_is_plain, model.modules())


def _is_plain(module: torch.nn.Module) -> bool:
    """Return whether a module is PyTorch's own linear layer, in float32 on a CPU."""
    if type(module) is not torch.nn.Linear or hasattr(module, "_hf_hook"):
        return False  # accelerate's hook, which moves inputs between devices, is in `forward`
    weight = module.weight
    is_whole = not hasattr(weight, "device_mesh")  # else a part of it: the base is sharded
    return is_whole and weight.device.type == "cpu" and weight.dtype == torch.float32


@functools.cache
def is_faster_here() -> bool:
    """Return whether PyTorch has oneDNN's product, on a processor where it is the faster one."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and multiplies_by(_same, _same)


def _same(weight: torch.Tensor) -> torch.Tensor:
    return weight


def multiplies_by(arrange: _Arrange, back: _Arrange) -> bool:
    """Return whether oneDNN's product is right with weights so arranged, which come back whole."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=draw) for size in ((3, 5, 70), (33, 70)))
    try:
        arranged = arrange(weight)
        near = torch.allclose(product(x, arranged, None), linear(x, weight), atol=1e-5)
        return near and torch.equal(back(arranged), weight)
    except (AttributeError, RuntimeError, TypeError):  # other builds, other signatures
        return False


def multiply(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return what a linear layer gives for x (…, in), (…, out)."""
    weight, bias = module.weight, module.bias
    small = weight.numel() < LARGE and x.numel() * weight.shape[0] < _MUCH
    if small or not multiplies(x) or weight.dtype != x.dtype or weight.requires_grad:
        return linear(x, weight, bias)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return product(x, weight, bias)
    result: torch.Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def multiplies(x: torch.Tensor) -> bool:
    """Return whether x is what weights on a CPU are multiplied with here."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return W·x + b (…, out) by oneDNN for x (…, in), with weights in any order that it reads."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens = rows.shape[0]
    missing = rounded(tokens) - tokens
    if missing:
        rows = pad(rows, (0, 0, 0, missing))
    product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    given: torch.Tensor = (product[:tokens] if missing else product).view(*x.shape[:-1], -1)
    return given


def rounded(tokens: int) -> int:
    """Return how many tokens are multiplied for so many, where oneDNN does."""
    return tokens + -tokens % _step(tokens)


@functools.lru_cache(maxsize=1024)
def _step(tokens: int) -> int:
    """Return the number of which so many tokens are rounded up to a multiple."""
    return next((step for most, step in _STEPS.items() if tokens <= most), 1)


class _Product(torch.autograd.Function):
    """W·x + b of a frozen layer, whose backward pass is such a product too."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t(), None), None, None
