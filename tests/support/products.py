"""Layers that multiply by oneDNN whatever the processor."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from lorakit.models import products

LARGE = (520, 512)  # what a layer gives and takes


def layer_of(size: tuple[int, int], *, bias: bool = False) -> torch.nn.Linear:
    """Return a frozen layer; always the same."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(size[1], size[0], bias=bias)
    return layer.requires_grad_(False)


def multiplied(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[tuple[int, ...]]:
    """Return a list that gets the shapes of the weights that a module multiplies by oneDNN."""
    shapes: list[tuple[int, ...]] = []
    product = products.product

    def noting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(module, "product", noting)
    return shapes
