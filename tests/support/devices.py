"""Tests that run on the CPU, and on a GPU by `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from lorakit.models.devices import is_here

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def here(name: str) -> torch.device:
    """Return a device of this machine; skips where there is none of this name."""
    device = torch.device(name)
    if not is_here(device):
        pytest.skip("this machine has no GPU")
    return device
