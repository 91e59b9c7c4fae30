"""The worked example of the gates: which row gets which layer's LoRA."""

from __future__ import annotations

import torch

from lorakit.boundary.cuts import Cut, bottom
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
        gates.set([bottom(k, 3) for k in boundaries])
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


def test_a_row_gets_its_own_share_of_each_layer(llama: str) -> None:
    base = open_base(llama)
    layers = attach(base, random_adapter(base))
    cuts = [Cut(1.0, (1.0, 0.5, 0.25)), Cut(1.0, (0.0, 0.5, 1.0))]
    x = torch.ones(2, 1, 32)
    queries = [layer for name, layer in layers.items() if name.endswith("q_proj")]
    whole = [layer.forward(x) - layer.get_base_layer()(x) for layer in queries]
    with Gates(layers).standing() as gates:
        gates.set(cuts)
        for number, (layer, change) in enumerate(zip(queries, whole, strict=True)):
            factors = torch.tensor([cut.factors[number] for cut in cuts]).view(2, 1, 1)
            expected = layer.get_base_layer()(x) + factors * change
            assert torch.allclose(layer.forward(x), expected, atol=1e-6)
