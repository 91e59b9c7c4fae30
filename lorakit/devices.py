"""Where to compute and in which number format."""

from __future__ import annotations

import os

import torch

from lorakit.errors import LorakitError


def pick_device(choice: str) -> torch.device:
    """Return the device of `auto` (the fastest there is), or the one asked for if it is there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if choice == "auto":
        choice = next(name for name, found in there.items() if found)
    if not there[choice]:
        raise LorakitError(f"this machine has no {choice} device; use --device auto")
    if choice == "cuda":  # one process a GPU, under torchrun or `accelerate launch`
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(choice)


def pick_dtype(choice: str, device: torch.device, *, training: bool) -> torch.dtype:
    """Return the base's number format.

    `auto` is bfloat16 where the device multiplies matrices much faster in it; on a CPU for training
    only, so that what is generated there does not depend on how rows are batched.
    """
    if choice != "auto":
        named: dict[str, torch.dtype] = {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }
        return named[choice]
    if device.type == "cpu":
        fast = training and _has_fast_bfloat16()
    else:
        fast = device.type != "cuda" or torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _has_fast_bfloat16() -> bool:
    """Whether this CPU has matrix instructions for bfloat16 (AMX)."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 does not have it yet
    return bool(ask and ask().get("amx_bf16", False))
