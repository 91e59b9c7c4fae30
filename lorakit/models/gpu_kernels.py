"""Which GPUs compute parts of a training step as one kernel each (triton_kernels.py).

Triton comes with PyTorch for NVIDIA GPUs on Linux, and asks for a C compiler. Where it is not here
or cannot compile, and in float32, PyTorch's own operations compute those parts.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch

from lorakit.models.devices import is_recent_nvidia

_HALF = (torch.bfloat16, torch.float16)


class _Found(NamedTuple):
    kernels: ModuleType | None = None
    reason: str | None = None  # why there are none, where there could be


def kernels_for(x: torch.Tensor) -> ModuleType | None:
    """Return triton_kernels.py where it computes with tensors like this one, else None."""
    return _kernels_on(x.device).kernels if _could_have(x.device, x.dtype) else None


def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a GPU that could compute by kernels in this dtype does not; None if it does."""
    return _kernels_on(device).reason if _could_have(device, dtype) else None


def _could_have(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in _HALF


@functools.cache
def _kernels_on(device: torch.device) -> _Found:
    """Try one of the kernels on a GPU: it has to give what PyTorch gives."""
    if not is_recent_nvidia(device):
        return _Found()
    try:
        kernels = importlib.import_module("lorakit.models.triton_kernels")
        x = torch.linspace(-4, 4, 100, device=device).to(torch.bfloat16)
        products = [kernels.swiglu(x, x) for _ in range(2)]  # compiled, then launched again
    except Exception as error:  # Triton, its compiler and its driver raise of many kinds
        return _Found(reason=f"{type(error).__name__}: {error}".partition("\n")[0])
    expected = torch.nn.functional.silu(x) * x
    if not all(torch.equal(product, expected) for product in products):
        return _Found(reason="they do not compute what PyTorch does")
    return _Found(kernels)
