"""A base's weights as products of few tokens read them best, while tokens are decoded on a CPU.

That is in 16 bits where these hold them (half_weights.py): such products take half as long as those
of products.py, or less. Else it is the order in which oneDNN reads them: a third less. Layers that
read the same input become one product, whose columns are theirs, one after another:

    q_proj(x)    computes [q k v] = [W_q W_k W_v]·x, gives q and keeps k and v
    k_proj(x)    gives k
    v_proj(x)    gives v

Weights in 16 bits are a copy. In oneDNN's order there is none: inside `packed_weights` they are in
no other. With AVX2 alone that gains with few tokens, but prompts take longer to read.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.nn.functional import linear

from lorakit.models.architecture import Model, other_forwards
from lorakit.models.devices import available_memory, one_thread, return_freed_memory
from lorakit.models.half_weights import FEW, HalfWeights, half_size, half_weights, multiplies_half
from lorakit.models.products import (
    LARGE,
    fast_layers,
    is_faster_here,
    multiplies,
    multiplies_by,
    multiply,
    product,
)

_KEPT = 1 << 24  # numbers that are freed before the system gets their memory
_FEW = 16  # tokens that weights are packed for; they serve others as well
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # read the same input
_THREADS = 4  # that put weights in 16 bits in order
_WAITING = 16  # groups of layers that wait for them at most, as what is made of each takes memory
_ROOM = 3  # times the memory that weights in 16 bits take, which has to be free
_Layers = list[torch.nn.Linear]


@contextlib.contextmanager
def packed_weights(model: Model) -> Iterator[None]:
    """Inside the block, large layers multiply by weights in 16 bits or in oneDNN's order.

    In the latter they hold no others; afterwards they have the same as before. Inside, nothing is
    trained, and weights are read by layers alone. Those that modules share, as the head may have
    the embedding's, stay in their order.
    """
    packed: list[_Packed] = []
    try:
        halved = _halved(model)
        with _replacing() as replaced:
            for layers in _packable(model, {layer for each in halved for layer in each.layers}):
                packed.append(_Packed(layers))
                replaced(packed[-1].weight.numel())
        forwards = {
            layer: functools.partial(each, place)
            for each in (*halved, *packed)
            for place, layer in enumerate(each.layers)
        }
        with other_forwards(forwards):
            yield
    finally:
        with _replacing() as replaced:
            while packed:
                replaced(packed.pop().give_back())


def reads_half(layer: torch.nn.Linear) -> bool:
    """Return whether a layer reads its weights in 16 bits now."""
    return isinstance(getattr(vars(layer).get("forward"), "func", None), _Halved)


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


class _Together(abc.ABC):
    """Layers that read the same input: a product that each asks for its part of."""

    def __init__(self, layers: _Layers) -> None:
        self.layers = layers
        self._sizes = [layer.out_features for layer in layers]
        self._x: torch.Tensor | None = None
        self._left: dict[int, torch.Tensor] = {}

    def __call__(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer at a place gives for x (…, in), (…, out)."""
        if not self._takes(x):
            return self._alone(place, x)
        if len(self.layers) == 1:
            return self._product(x)
        if x is not self._x or place not in self._left:
            self._x, self._left = x, dict(enumerate(self._product(x).split(self._sizes, -1)))
        part = self._left.pop(place)
        if not self._left:
            self._x = None
        return part

    def _takes(self, x: torch.Tensor) -> bool:
        """Return whether x is multiplied with all weights at once."""
        return multiplies(x) and not (torch.is_grad_enabled() and x.requires_grad)

    @abc.abstractmethod
    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """Return what all layers give, one after another (…, out)."""

    @abc.abstractmethod
    def _alone(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer at a place gives."""


class _Halved(_Together):
    """Layers with a copy of their weights in 16 bits, for few tokens."""

    def __init__(self, layers: _Layers, weights: HalfWeights) -> None:
        super().__init__(layers)
        self.weights = weights

    def _takes(self, x: torch.Tensor) -> bool:
        return super()._takes(x) and x.numel() <= FEW * x.shape[-1]

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return self.weights(x)

    def _alone(self, place: int, x: torch.Tensor) -> torch.Tensor:
        return multiply(self.layers[place], x)


class _Packed(_Together):
    """Layers whose weights are in oneDNN's order."""

    def __init__(self, layers: _Layers) -> None:
        super().__init__(layers)
        weight, self._bias = _joined(layers)
        self.weight = _in_order(weight)
        for layer in layers:
            layer.weight.data = layer.weight.new_empty(0)

    def give_back(self) -> int:
        """Let the layers hold their weights again; return how many numbers these are."""
        parts = self.weight.to_dense().split(self._sizes)
        for layer, part in zip(self.layers, parts, strict=True):
            layer.weight.data = part if len(parts) == 1 else part.clone()
        return self.weight.numel()

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self._bias)

    def _alone(self, place: int, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to_dense().split(self._sizes)[place]
        return linear(x, weight, self.layers[place].bias)


def _joined(layers: _Layers) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weights (out, in) and the bias (out,), if any, of layers as one."""
    weights = [layer.weight.data for layer in layers]
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return weight, torch.cat(biases) if biases else None


@torch.no_grad()
def _halved(model: Model) -> list[_Halved]:
    """Return the layers whose weights 16 bits hold, with these; none where memory is short."""
    groups = _groups(model, _frozen(model))
    size = sum(half_size(layer) for layers in groups for layer in layers)
    if not groups or not multiplies_half() or _ROOM * size > available_memory():
        return []
    halved: list[_Halved] = []
    threads = min(torch.get_num_threads(), _THREADS)
    with torch.inference_mode(False), one_thread(), ThreadPoolExecutor(threads) as pool:
        for layers in sorted(groups, key=_numbers, reverse=True):  # the head takes longest
            weights = half_weights(*_joined(layers), pool)
            if weights is not None:
                halved.append(_Halved(layers, weights))
                if len(halved) > _WAITING:
                    halved[-_WAITING].weights.finish()
    return halved


def _packable(model: Model, besides: Collection[torch.nn.Linear] = ()) -> list[_Layers]:
    """Return the other layers whose weights can be packed, together those that are one product.

    There are none where DoRA reads weights.
    """
    modules = list(model.modules())
    if not _packs_here() or any(getattr(m, "lora_magnitude_vector", None) for m in modules):
        return []
    held = Counter(
        weight.data_ptr()
        for module in modules
        for weight in module._parameters.values()
        if weight is not None
    )
    alone = [layer for layer in _frozen(model) if held[layer.weight.data_ptr()] == 1]
    return _groups(model, (layer for layer in alone if layer not in besides))


def _frozen(model: Model) -> Iterator[torch.nn.Linear]:
    """Yield the layers that multiply faster here and are not trained."""
    for layer in fast_layers(model):
        if layer.weight.is_contiguous() and not layer.weight.requires_grad:
            yield layer


def _groups(model: Model, layers: Iterable[torch.nn.Linear]) -> list[_Layers]:
    """Return those of the layers that are large, together those that are one product then."""
    alone, found = dict.fromkeys(layers), list[_Layers]()
    for parent in model.modules():
        for names in _TOGETHER:
            group = [_plain(getattr(parent, name, None)) for name in names]
            if all(layer in alone for layer in group) and _fit(group):
                found.append(group)
                for layer in group:
                    del alone[layer]
    found += [[layer] for layer in alone]
    return [group for group in found if _numbers(group) >= LARGE]


def _numbers(layers: _Layers) -> int:
    """Return how many weights layers have."""
    return sum(layer.weight.numel() for layer in layers)


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
