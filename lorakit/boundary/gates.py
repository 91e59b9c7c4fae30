"""Boundaries by row: each row of a batch keeps the LoRA of its own bottom k layers.

Rows with different boundaries can share a batch, because the boundary only decides whether a row
gets a layer's LoRA. Inside `standing`, PEFT's layers compute W0·x + s·B·(g·A·x), where the gate g
of a row is 1 in the layers below its boundary and 0 in the others, to which exactly 0 is added.
Three rows in a model of four layers, after set([3, 1, 0]):

    layer 0   g = 1 1 0
    layer 1   g = 1 0 0
    layer 2   g = 1 0 0
    layer 3   only W0·x, as no row's boundary is above it

If all rows have a layer's LoRA, as after set([2]) in layers 0 and 1, there is no multiplication by
a gate. Where the rows come from is not known here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.nn.functional import linear

from lorakit.adapters.names import layer_of
from lorakit.models.lora import ADAPTER, PeftLayer, factors

_Forward = Callable[..., torch.Tensor]


def layers_on(layers: Mapping[str, PeftLayer], boundary: int) -> frozenset[int]:
    """Return the layers whose LoRA is on at a boundary; equal sets mean equal models.

    A module outside the decoder layers, such as the head, counts as in layer 0: it is off only at
    boundary 0.
    """
    return frozenset(layer for name in layers if (layer := layer_of(name) or 0) < boundary)


class Gates:
    """The LoRA of a model, switched by the boundaries of the rows that go through it next."""

    def __init__(self, layers: Mapping[str, PeftLayer]) -> None:
        self._layers = layers
        self._boundaries: tuple[int, ...] = ()
        self._gates: dict[int, torch.Tensor] = {}

    def set(self, boundaries: Sequence[int]) -> None:
        """Set the boundary of every row of the next batches; a single one applies to all rows.

        A batch with fewer rows uses the first ones.
        """
        if self._boundaries != tuple(boundaries):
            self._boundaries = tuple(boundaries)
            self._gates = {}
            self._lowest, self._highest = min(boundaries), max(boundaries)

    @contextlib.contextmanager
    def standing(self) -> Iterator[Gates]:
        """Gate PEFT's layers inside the block, and restore them afterwards."""
        try:
            for name, layer in self._layers.items():
                layer.forward = self._gated(layer, layer_of(name) or 0)
            yield self
        finally:
            for layer in self._layers.values():
                layer.__dict__.pop("forward", None)

    def _gated(self, layer: PeftLayer, number: int) -> _Forward:
        """Return the gated forward of a PEFT layer in decoder layer `number`."""
        base_layer, scale = layer.get_base_layer(), layer.scaling[ADAPTER]
        a, b = factors(layer)

        def forward(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            plain: torch.Tensor = base_layer(x, *args, **kwargs)
            if number >= self._highest:
                return plain
            low = linear(x.to(a.dtype), a)
            if number >= self._lowest:
                low = low * self._gate(number, x.device)[: len(x)]
            adapted: torch.Tensor = plain + linear(low, b) * scale
            return adapted.to(plain.dtype)

        return forward

    def _gate(self, number: int, device: torch.device) -> torch.Tensor:
        """Return 1 for each row whose boundary is above layer `number`, else 0: (rows, 1, 1)."""
        if number not in self._gates:
            gate = [float(boundary > number) for boundary in self._boundaries]
            self._gates[number] = torch.tensor(gate, device=device).view(-1, 1, 1)
        return self._gates[number]
