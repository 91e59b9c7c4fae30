"""Products with a base's weights on a CPU, by oneDNN's kernels.

PyTorch multiplies float32 matrices by MKL, which does not use what processors of other makers can
do (AVX-512 on AMD's), and which rearranges the weights at every call: with few tokens that takes
as long as the product. oneDNN, which PyTorch has on board for other number formats, is faster with
few tokens and many; results differ from MKL's by rounding. Which products are large enough to gain
was measured on such a processor: small ones pay for the call.

With the weights in the order in which oneDNN reads them, products with few tokens take another
third less. `packed_weights` keeps them so while tokens are decoded, in place of the others. With
AVX2 alone that gains with few tokens, but prompts take longer to read.

oneDNN writes a program for each shape, and keeps a thousand of them: half a megabyte each where
tokens are few. So they are filled up to one of few numbers, with tokens of zeros.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.functional import linear, pad

from lorakit.models.architecture import Model, other_forwards
from lorakit.models.devices import return_freed_memory

_Arrange = Callable[[torch.Tensor], torch.Tensor]
_LARGE = 1 << 18  # weights from which a product with a single token gains
_MUCH = 1 << 24  # multiplications from which any does
_KEPT = 1 << 24  # numbers that are freed before the system gets their memory
_FEW = 16  # tokens that weights are packed for; they serve others as well
# Up to so many tokens, their number is rounded up to a multiple of this; larger programs are small.
_STEPS = {1: 1, 64: 4, 128: 8, 256: 16, 512: 32}


def speed_up_products_(model: Model) -> None:
    """Have the linear layers of a model multiply by oneDNN where that is faster: on some CPUs."""
    for layer in fast_layers(model):
        layer.forward = functools.partial(_forward, layer)


def fast_layers(model: Model) -> Iterator[Any]:
    """Yield the linear layers of a model that multiply faster by oneDNN here."""
    if _is_faster_here():
        yield from filter(_is_plain, model.modules())


@contextlib.contextmanager
def packed_weights(model: Model) -> Iterator[None]:
    """Inside the block, large layers hold their weights as oneDNN reads them, and no others.

    Afterwards they have the same as before. Inside, nothing is trained, and weights are read by
    layers alone. Those that modules share, as the head may have the embedding's, stay.
    """
    packed: dict[Any, torch.Tensor] = {}
    try:
        with _replacing() as replaced:
            for layer in _packable(model):
                packed[layer] = _packed(layer.weight)
                layer.weight.data = layer.weight.new_empty(0)
                replaced(packed[layer].numel())
        with other_forwards({each: functools.partial(_by_packed, packed, each) for each in packed}):
            yield
    finally:
        with _replacing() as replaced:
            for layer in list(packed):
                layer.weight.data = packed[layer].to_dense()
                replaced(packed.pop(layer).numel())


@contextlib.contextmanager
def _replacing() -> Iterator[Callable[[int], None]]:
    """Inside the block, tensors are replaced that serve training, too; give how many numbers each.

    What was freed goes back to the system now and then, as it does not fit those that come.
    """
    freed = 0

    def replaced(numbers: int) -> None:
        nonlocal freed
        freed += numbers
        if freed > _KEPT:
            return_freed_memory()
            freed = 0

    with torch.inference_mode(False), torch.no_grad():
        yield replaced
    if freed:
        return_freed_memory()


def _packable(model: Model) -> list[Any]:
    """Return the layers whose weights can be packed; none where DoRA reads them."""
    if not _packs_here():
        return []
    modules = list(model.modules())
    if any(getattr(module, "lora_magnitude_vector", None) for module in modules):
        return []
    held = Counter(
        weight.data_ptr()
        for module in modules
        for weight in module._parameters.values()
        if weight is not None
    )
    return [
        layer
        for layer in fast_layers(model)
        if layer.weight.numel() >= _LARGE
        and layer.weight.is_contiguous()
        and not layer.weight.requires_grad
        and held[layer.weight.data_ptr()] == 1
    ]


@functools.cache
def _packs_here() -> bool:
    """Return whether PyTorch puts weights in oneDNN's order and back, and is faster by them."""
    return _is_faster_here() and _multiplies_by(_packed, torch.Tensor.to_dense)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """Return weights in oneDNN's order."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _FEW)
    return packed


def _by_packed(
    packed: Mapping[Any, torch.Tensor], layer: torch.nn.Linear, x: torch.Tensor
) -> torch.Tensor:
    """Return what a linear layer gives for x (…, in), (…, out), by its packed weights."""
    weight = packed[layer]
    if _multiplies(x, weight) and not (torch.is_grad_enabled() and x.requires_grad):
        return _product(x, weight, layer.bias)
    return linear(x, weight.to_dense(), layer.bias)


def _is_plain(module: torch.nn.Module) -> bool:
    """Return whether a module is PyTorch's own linear layer, in float32 on a CPU."""
    if type(module) is not torch.nn.Linear or hasattr(module, "_hf_hook"):
        return False  # accelerate's hook, which moves inputs between devices, is in `forward`
    weight = module.weight
    is_whole = not hasattr(weight, "device_mesh")  # else a part of it: the base is sharded
    return is_whole and weight.device.type == "cpu" and weight.dtype == torch.float32


@functools.cache
def _is_faster_here() -> bool:
    """Return whether PyTorch has oneDNN's product, on a processor where it is the faster one."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _multiplies_by(_same, _same)


def _same(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _multiplies_by(arrange: _Arrange, back: _Arrange) -> bool:
    """Return whether oneDNN's product is right with weights so arranged, which come back whole."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=draw) for size in ((3, 5, 70), (33, 70)))
    try:
        arranged = arrange(weight)
        near = torch.allclose(_product(x, arranged, None), linear(x, weight), atol=1e-5)
        return near and torch.equal(back(arranged), weight)
    except (AttributeError, RuntimeError, TypeError):  # other builds, other signatures
        return False


def _forward(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return what a linear layer gives for x (…, in), (…, out)."""
    weight, bias = module.weight, module.bias
    small = weight.numel() < _LARGE and x.numel() * weight.shape[0] < _MUCH
    if small or not _multiplies(x, weight) or weight.requires_grad:
        return linear(x, weight, bias)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _product(x, weight, bias)
    result: torch.Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def _multiplies(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether both are what oneDNN is given here."""
    return x.dtype == weight.dtype == torch.float32 and x.device == weight.device and x.numel() > 0


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens = rows.shape[0]
    missing = -tokens % _step(tokens)
    if missing:
        rows = pad(rows, (0, 0, 0, missing))
    product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    given: torch.Tensor = (product[:tokens] if missing else product).view(*x.shape[:-1], -1)
    return given


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
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.t(), None), None, None
