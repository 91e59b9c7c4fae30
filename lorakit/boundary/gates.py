"""Boundaries by row: the rows of one batch keep the LoRA of the bottom k layers, each its own k.

While the gates stand, PEFT's layers compute W0·x + s·B·(g·A·x), g being 1 for a row whose boundary
lies above the layer and 0 for the others, to which exactly nothing is added. Rows that are all of
one kind pay for no gate. How the rows came about is not known here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from lorakit.adapters.names import layer_of
from lorakit.models.base import ADAPTER
from lorakit.models.lora import PeftLayer, factors

_Forward = Callable[..., torch.Tensor]


def layers_on(layers: Mapping[str, PeftLayer], boundary: int) -> frozenset[int]:
    """Return the layers whose LoRA is on at a boundary; two boundaries with one set are one model.

    A module that is in no decoder layer, such as the head, counts as layer 0: it is off only at 0.
    """
    return frozenset(layer for name in layers if (layer := layer_of(name) or 0) < boundary)


class Gates:
    """The LoRA of a model, gated by the boundaries of the rows that are next given to it."""

    def __init__(self, layers: Mapping[str, PeftLayer]) -> None:
        self._layers = layers
        self._boundaries: tuple[int, ...] = ()
        self._gates: dict[int, torch.Tensor] = {}

    def set(self, boundaries: Sequence[int]) -> None:
        """Say the boundary of every row of the next batches; of one boundary all rows have it.

        A batch of fewer rows has the first ones.
        """
        if self._boundaries != tuple(boundaries):
            self._boundaries = tuple(boundaries)
            self._gates = {}
            self._least, self._most = min(boundaries), max(boundaries)

    @contextlib.contextmanager
    def standing(self) -> Iterator[Gates]:
        """Gate PEFT's layers inside the block; afterwards they are as they were."""
        try:
            for name, layer in self._layers.items():
                layer.forward = self._gated(layer, layer_of(name) or 0)
            yield self
        finally:
            for layer in self._layers.values():
                layer.__dict__.pop("forward", None)

    def _gated(self, layer: PeftLayer, number: int) -> _Forward:
        base_layer, scale = layer.get_base_layer(), layer.scaling[ADAPTER]
        a, b = factors(layer)

        def forward(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            plain: torch.Tensor = base_layer(x, *rest, **more)
            if number >= self._most:
                return plain
            low = linear(x.to(a.dtype), a)
            if number >= self._least:
                low = low * self._gate(number, x.device)[: len(x)]
            changed: torch.Tensor = plain + linear(low, b) * scale
            return changed.to(plain.dtype)

        return forward

    def _gate(self, number: int, device: torch.device) -> torch.Tensor:
        """Return 1 for each row whose boundary is above the layer, else 0: (rows, 1, 1) float32."""
        if number not in self._gates:
            on = [float(boundary > number) for boundary in self._boundaries]
            self._gates[number] = torch.tensor(on, device=device).view(-1, 1, 1)
        return self._gates[number]
