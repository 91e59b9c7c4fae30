"""The device to compute on, the number format, and how a CPU program reuses freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from lorakit.errors import LorakitError

# From glibc's malloc.h. Blocks above _LARGEST_KEPT are always given back; it takes 32 MiB at most.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT, _MOST_KEPT = 32 * 2**20, 2**30
_GROUP = "/sys/fs/cgroup"  # where a container sees its own limits
_AMPERE = (8, 0)
# The number formats of weights: as --dtype names them, as safetensors does, and as torch does.
FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation; without glibc, do nothing.

    It keeps blocks of up to 32 MiB, and returns the end of its heap once 1 GiB of it is free. A
    pass through a model frees every tensor soon after it was allocated; returning that memory to
    the system and getting it back page by page took a third of LoRAHub's time on a small model.
    Only a program should call this, since malloc's settings apply to the whole process.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc, or no such call
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)


def return_freed_memory() -> None:
    """Return what was freed to the system, where glibc keeps it."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int:
    """Return how many bytes a program can still allocate, by Linux and its control group; else 0.

    Files that the system caches in a group's memory count as taken.
    """
    found = [0]
    with contextlib.suppress(OSError, LookupError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = dict(line.split(":") for line in lines)["MemAvailable"].split()[0]
        found = [int(kilobytes) * 1024]
    with contextlib.suppress(OSError, ValueError):
        most, taken = (Path(_GROUP, name).read_text() for name in ("memory.max", "memory.current"))
        found.append(int(most) - int(taken))
    return max(0, min(found))


def is_recent_nvidia(gpu: torch.device) -> bool:
    """Return whether a GPU is NVIDIA's, of Ampere or later, which have TensorFloat-32."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(gpu) >= _AMPERE


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in a single thread inside the block, for many small steps.

    Threads that wait for each other after each step take longer than the step where a core is busy
    with something else.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(choice: str) -> torch.device:
    """Return the device named `choice`; `auto` is the fastest available.

    Raises LorakitError if the machine does not have it.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if choice == "auto":
        choice = next(name for name, present in available.items() if present)
    if not available[choice]:
        raise LorakitError(f"this machine has no {choice} device; use --device auto")
    if choice == "cuda":  # one process per GPU, under torchrun or `accelerate launch`
        rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        processes = max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if processes > gpus:
            raise LorakitError(
                f"this machine has fewer GPUs than processes, {gpus} for {processes}; start at "
                f"most {gpus} on it"
            )
        return torch.device("cuda", rank)
    return torch.device(choice)


def is_here(device: torch.device) -> bool:
    """Return whether the machine has a device of this type."""
    if device.type == "cuda":
        return torch.cuda.is_available()
    return device.type != "mps" or bool(torch.backends.mps.is_available())


def plan_device(choice: str) -> torch.device:
    """Return the device named `choice`, here or not; `auto` is the fastest of this machine."""
    return torch.device(choice) if choice != "auto" else pick_device(choice)


def plan_dtype(choice: str, device: torch.device, *, training: bool) -> torch.dtype:
    """Return the base's number format on a device that may be another machine's.

    For a GPU that is not here `auto` is bfloat16, which all recent ones multiply fast. Raises
    LorakitError as `pick_dtype` does.
    """
    absent = device.type == "cuda" and not is_here(device)
    return pick_dtype(
        "bfloat16" if absent and choice == "auto" else choice, device, training=training
    )


def device_name(device: torch.device) -> str:
    """Return what a reader knows a device by: a GPU's name, or the number of a CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type if device.type != "cpu" else f"cpu, {torch.get_num_threads()} threads"


def pick_dtype(choice: str, device: torch.device, *, training: bool) -> torch.dtype:
    """Return the base's number format.

    `auto` is bfloat16 if the device multiplies matrices much faster in it, on a CPU for training
    only, so that what is generated there does not depend on how rows are batched. Raises
    LorakitError for float16 in training, where small gradients would underflow.
    """
    if choice == "float16" and training:
        raise LorakitError("float16 gradients underflow; train with --dtype bfloat16 or float32")
    if choice != "auto":
        return DTYPES[FORMATS[choice]]
    if device.type == "cpu":
        fast = training and _has_fast_bfloat16()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def _has_fast_bfloat16() -> bool:
    """Return whether this CPU has matrix instructions for bfloat16 (AMX)."""
    supports_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supports_amx and supports_amx())
