"""The worked example of the gates: which row gets which layer's LoRA."""

from __future__ import annotations

import torch

from lorakit.boundary.gates import Gates
from lorakit.models.lora import attach
from tests.support.boundary_models import random_adapter
from tests.support.models import open_base


def rows_adapted(llama: str, boundaries: list[int]) -> list[list[bool]]:
    """Return, for each layer's query projection, which of three equal rows LoRA changes."""
    base = open_base(llama)
    layers = attach(base, random_adapter(base))
    adapted = []
    with Gates(layers).standing() as gates:
        gates.set(boundaries)
        for name, layer in layers.items():
            if name.endswith("q_proj"):
                x = torch.ones(3, 1, 32)
                plain = layer.get_base_layer()(x)
                adapted.append(
                    [
                        bool((row != other).any())
                        for row, other in zip(layer.forward(x), plain, strict=True)
                    ]
                )
    return adapted


def test_a_row_gets_lora_in_the_layers_below_its_boundary(llama: str) -> None:
    first, second, third = [True, True, False], [True, False, False], [True, False, False]
    assert rows_adapted(llama, [3, 1, 0]) == [first, second, third]
    assert rows_adapted(llama, [2]) == [[True] * 3, [True] * 3, [False] * 3]
