"""Time and memory: both sides in turns, so that what else a machine does meets them alike."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

from tests.benchmarks.machine import synchronise

T = TypeVar("T")


class Timed(NamedTuple, Generic[T]):
    """What a call returned, how long it took, in seconds by the clock and of the processor, and its
    peak of memory above what was held before, in MB."""

    output: T
    seconds: float
    processor: float
    memory: float


class Ratio(NamedTuple):
    """How many times as much the peer takes: the median over rounds, the lowest and the highest."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> tuple[float, float]:
        return self.low, self.high


def timed(work: Callable[[], T], device: torch.device) -> Timed[T]:
    """Call `work` once and measure it."""
    memory = Memory(device)
    started, used = time.perf_counter(), time.process_time()
    output = work()
    synchronise(device)
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    return Timed(output, seconds, processor, memory.peak())


def all_in_turns(sides: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call every side in every round, in reverse in every other one; return what they returned."""
    results: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            results[name].append(sides[name]())
    return results


def in_turns(ours: Callable[[], T], peer: Callable[[], T], rounds: int) -> tuple[list[T], list[T]]:
    """Call both sides in turns, ours first in every other round; return what they returned."""
    results = all_in_turns({"ours": ours, "peer": peer}, rounds)
    return results["ours"], results["peer"]


def ratio_of(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Return how many times as much the peer takes, over the rounds."""
    ratios = [theirs / own for own, theirs in zip(ours, peer, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


class Memory:
    """The peak of what this process, or the GPU, holds from now on above what it holds now: MB.

    It is 0 on a CPU whose system has no /proc.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        give_back_freed_memory()
        reset_peak()
        self._before = status("VmRSS")

    def peak(self) -> float:
        top = torch.cuda.max_memory_allocated() if self._cuda else status("VmHWM")
        return max(0, top - self._before) / 1e6


def give_back_freed_memory() -> None:
    """Have glibc return what is free, so that work that takes it again raises the peak."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc, or no such call
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Have the peak of the resident set begin anew."""
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def status(name: str) -> int:
    """Return a size of this process in bytes, by its name in /proc/self/status; 0 without one."""
    path = Path("/proc/self/status")
    text = path.read_text() if path.exists() else ""
    return 1024 * int(text.split(f"{name}:")[1].split()[0]) if f"{name}:" in text else 0
