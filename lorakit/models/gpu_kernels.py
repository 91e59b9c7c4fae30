"""Which GPUs compute parts of a training step as one kernel each (triton_kernels.py).

Triton comes with PyTorch for NVIDIA GPUs on Linux, and asks for a C compiler. Where it is not here
or cannot compile, and in float32, PyTorch's own operations compute those parts.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

_HALF = (torch.bfloat16, torch.float16)
_AMPERE = (8, 0)  # the oldest GPUs with TensorFloat-32


def kernels_for(x: torch.Tensor) -> ModuleType | None:
    """Return triton_kernels.py where it computes with tensors like this one, else None."""
    if x.device.type != "cuda" or x.dtype not in _HALF:
        return None
    return _kernels_on(x.device)


@functools.cache
def _kernels_on(device: torch.device) -> ModuleType | None:
    """Return triton_kernels.py if one of its kernels gives what PyTorch gives on this GPU."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < _AMPERE:
        return None
    try:
        kernels = importlib.import_module("lorakit.models.triton_kernels")
        x = torch.linspace(-4, 4, 100, device=device).to(torch.bfloat16)
        products = [kernels.swiglu(x, x) for _ in range(2)]  # compiled, then launched again
    except Exception:  # Triton, its compiler and its driver raise of many kinds
        return None
    expected = torch.nn.functional.silu(x) * x
    return kernels if all(torch.equal(product, expected) for product in products) else None
