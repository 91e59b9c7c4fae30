"""The machine that a benchmark runs on: its processor, its number format and its matrix rate."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.models.devices import device_name, pick_device, pick_dtype

# Instructions that decide how fast matrices are multiplied, by their names in /proc/cpuinfo.
_MATRIX_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"),
    *("asimd", "sve", "sve2", "bf16", "i8mm"),
)
_MOST_SECONDS = 2.0  # for the matrix rate


@dataclass(frozen=True)
class Machine:
    """What a result depends on besides the program."""

    processor: str
    flags: tuple[str, ...]
    capability: str  # of these, what PyTorch's own kernels use
    cores: int
    threads: int
    waiting: str
    device: str
    dtype: str
    torch: str

    def __str__(self) -> str:
        flags = " ".join(self.flags) or "no matrix flags known"
        return (
            f"{self.processor} ({flags}; used: {self.capability}), {self.cores} cores, "
            f"{self.threads} threads ({self.waiting}); {self.device}, {self.dtype}, "
            f"torch {self.torch}"
        )


def describe_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Return this machine as it computes on `device` in `dtype`."""
    return Machine(
        processor=_cpu_field("model name") or platform.processor() or platform.machine(),
        flags=_flags(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores(),
        threads=torch.get_num_threads(),
        waiting=f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'unset').lower()}",
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__,
    )


def pick(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return the device of this name, and the number format; `auto` is its fast one."""
    chosen = pick_device(device)
    return chosen, pick_dtype(dtype, chosen, training=True)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Return the rate of multiplying two square matrices, in FLOP/s: the best of ten.

    It tries no longer than _MOST_SECONDS, so that a number format without instructions ends too.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device).to(dtype)
    best, begun = 0.0, time.perf_counter()
    for _ in range(10):
        started = time.perf_counter()
        _ = a @ a
        synchronise(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - started))
        if time.perf_counter() - begun > _MOST_SECONDS:
            break
    return best


class Moment:
    """When a device has done what it was given before: of a GPU, which is not waited for."""

    def __init__(self, device: torch.device) -> None:
        self._at, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def until(self, later: Moment) -> float:
        """Return the seconds until a later moment."""
        if self._event is None or later._event is None:
            return later._at - self._at
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1000  # from milliseconds


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _cores() -> int:
    return os.cpu_count() or 1


def _flags() -> tuple[str, ...]:
    present = (_cpu_field("flags") or _cpu_field("Features")).split()
    return tuple(flag for flag in _MATRIX_FLAGS if flag in present)


def _cpu_field(name: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == name), "")
