"""A base's weights in the order in which oneDNN reads them, while tokens are decoded on a CPU.

With few tokens, products take another third less so (products.py). Layers that read the same input
become one product, whose columns are theirs, one after another:

    q_proj(x)    computes [q k v] = [W_q W_k W_v]·x, gives q and keeps k and v
    k_proj(x)    gives k
    v_proj(x)    gives v

There is no copy: inside `packed_weights` the weights are in no other order. With AVX2 alone that
gains with few tokens, but prompts take longer to read.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from lorakit.models.architecture import Model, other_forwards
from lorakit.models.devices import return_freed_memory
from lorakit.models.products import (
    LARGE,
    fast_layers,
    is_faster_here,
    multiplies,
    multiplies_by,
    product,
)

_KEPT = 1 << 24  # numbers that are freed before the system gets their memory
_FEW = 16  # tokens that weights are packed for; they serve others as well
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # read the same input
_Layers = list[torch.nn.Linear]


@contextlib.contextmanager
def packed_weights(model: Model) -> Iterator[None]:
    """Inside the block, large layers hold their weights as oneDNN reads them, and no others.

    Afterwards they have the same as before. Inside, nothing is trained, and weights are read by
    layers alone. Those that modules share, as the head may have the embedding's, stay.
    """
    packed: list[_Packed] = []
    try:
        with _replacing() as replaced:
            for layers in _packable(model):
                packed.append(_Packed(layers))
                replaced(packed[-1].weight.numel())
        forwards = {
            layer: functools.partial(each, place)
            for each in packed
            for place, layer in enumerate(each.layers)
        }
        with other_forwards(forwards):
            yield
    finally:
        with _replacing() as replaced:
            while packed:
                replaced(packed.pop().give_back())


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


class _Packed:
    """The weights of layers that read the same input: a product that each asks for its part of."""

    def __init__(self, layers: _Layers) -> None:
        self.layers = layers
        self._sizes = [layer.out_features for layer in layers]
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        weights = [layer.weight.data for layer in layers]
        self.weight = _in_order(weights[0] if len(weights) == 1 else torch.cat(weights))
        for layer in layers:
            layer.weight.data = layer.weight.new_empty(0)
        self._x: torch.Tensor | None = None
        self._left: dict[int, torch.Tensor] = {}

    def give_back(self) -> int:
        """Let the layers hold their weights again; return how many numbers these are."""
        parts = self.weight.to_dense().split(self._sizes)
        for layer, part in zip(self.layers, parts, strict=True):
            layer.weight.data = part if len(parts) == 1 else part.clone()
        return self.weight.numel()

    def __call__(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer at a place gives for x (…, in), (…, out)."""
        if not multiplies(x, self.weight) or (torch.is_grad_enabled() and x.requires_grad):
            weight = self.weight.to_dense().split(self._sizes)[place]
            return linear(x, weight, self.layers[place].bias)
        if len(self.layers) == 1:
            return product(x, self.weight, self._bias)
        if x is not self._x or place not in self._left:
            columns = product(x, self.weight, self._bias).split(self._sizes, -1)
            self._x, self._left = x, dict(enumerate(columns))
        part = self._left.pop(place)
        if not self._left:
            self._x = None
        return part


def _packable(model: Model) -> list[_Layers]:
    """Return the layers whose weights can be packed, together those that are one product then.

    There are none where DoRA reads weights.
    """
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
    alone = {
        layer: None
        for layer in fast_layers(model)
        if layer.weight.is_contiguous()
        and not layer.weight.requires_grad
        and held[layer.weight.data_ptr()] == 1
    }
    found: list[_Layers] = []
    for parent in modules:
        for names in _TOGETHER:
            layers = [_plain(getattr(parent, name, None)) for name in names]
            if all(layer in alone for layer in layers) and _fit(layers):
                found.append(layers)
                for layer in layers:
                    del alone[layer]
    found += [[layer] for layer in alone]
    return [layers for layers in found if sum(layer.weight.numel() for layer in layers) >= LARGE]


def _plain(layer: Any) -> Any:
    """Return the base's own layer below PEFT's."""
    return getattr(layer, "base_layer", layer)


def _fit(layers: Sequence[torch.nn.Linear]) -> bool:
    """Return whether different layers take inputs of one size, all with a bias or all without."""
    kinds = {(layer.in_features, layer.bias is None) for layer in layers}
    return len(kinds) == 1 and len(set(layers)) == len(layers)


@functools.cache
def _packs_here() -> bool:
    """Return whether PyTorch puts weights in oneDNN's order and back, and is faster by them."""
    return is_faster_here() and multiplies_by(_in_order, torch.Tensor.to_dense)


def _in_order(weight: torch.Tensor) -> torch.Tensor:
    """Return weights in oneDNN's order."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _FEW)
    return packed
