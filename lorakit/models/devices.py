"""Where to compute, in which number format, and what a CPU does with freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch

from lorakit.errors import LorakitError

# From glibc's malloc.h. Blocks above _LARGEST_KEPT are always given back; it takes 32 MiB at most.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT, _MOST_KEPT = 32 * 2**20, 2**30


def keep_freed_memory() -> None:
    """Let glibc keep what was freed for what is asked for next; elsewhere do nothing.

    It keeps blocks of up to 32 MiB, and gives the end of its heap back once 1 GiB of it is free.
    A pass through a model frees every tensor soon after it is made. Giving the memory back to the
    system and getting it anew, page by page, took a third of the time of LoRAHub on a small model.
    It is for programs: malloc's settings belong to the whole process.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc, or no such call
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)


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
        place = int(os.environ.get("LOCAL_RANK", "0"))
        if place >= torch.cuda.device_count():
            raise LorakitError(
                f"there is no GPU for process {place}; start at most {torch.cuda.device_count()}"
            )
        return torch.device("cuda", place)
    return torch.device(choice)


def pick_dtype(choice: str, device: torch.device, *, training: bool) -> torch.dtype:
    """Return the base's number format.

    `auto` is bfloat16 where the device multiplies matrices much faster in it; on a CPU for training
    only, so that what is generated there does not depend on how rows are batched. Raises
    LorakitError for float16 in training, where small gradients would be lost.
    """
    if choice == "float16" and training:
        raise LorakitError("float16 gradients underflow; train with --dtype bfloat16 or float32")
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
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def _has_fast_bfloat16() -> bool:
    """Whether this CPU has matrix instructions for bfloat16 (AMX)."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(ask and ask())
