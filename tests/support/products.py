"""Layers that multiply by oneDNN whatever the processor."""

from __future__ import annotations

import torch

LARGE = (520, 512)  # what a layer gives and takes


def layer_of(size: tuple[int, int], *, bias: bool = False) -> torch.nn.Linear:
    """Return a frozen layer; always the same."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(size[1], size[0], bias=bias)
    return layer.requires_grad_(False)
