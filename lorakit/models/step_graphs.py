"""A computation on a GPU that is repeated in few shapes, recorded once for each (CUDA graphs).

A step of decoding launches hundreds of kernels, most of which take the GPU less time than Python
takes to launch them. Recorded, they are launched at once:

    call 1      computed as always
    call 2      the same, with an error where it would wait for the GPU, which cannot be recorded
    call 3      recorded, then replayed
    call 4 …    the input is copied to where the recording reads it, and replayed

What is recorded reads and writes the same places in memory whenever it is replayed. Whoever moves
what it reads calls `forget`. What cannot be recorded is computed as always, and so is everything on
other devices.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch

from lorakit.models.architecture import Model

Outputs = tuple[torch.Tensor, ...]
Compute = Callable[[torch.Tensor], Outputs]
_refusing: weakref.WeakSet[Model] = weakref.WeakSet()  # models that cannot be recorded


class _Recording(NamedTuple):
    """A graph, where it reads its input, and where it leaves its outputs."""

    graph: torch.cuda.CUDAGraph
    read: torch.Tensor
    outputs: Outputs


class StepGraphs:
    """Computes steps of a model on its device."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self._model, self._device = model, device
        self._calls: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recording] = {}
        self._pool: Any = None  # torch gives its handles a type of its own

    @property
    def count(self) -> int:
        """How many shapes are recorded."""
        return len(self._recorded)

    def forget(self) -> None:
        """Drop all recordings and their memory."""
        self._calls.clear()
        self._recorded.clear()
        self._pool = None

    def __call__(self, key: Hashable, read: torch.Tensor, compute: Compute) -> Outputs:
        """Return what `compute` returns for `read`, a tensor on the CPU, until the next call.

        `key` says in which shape it computes, and all else that it depends on but `read`.
        """
        self._calls[key] += 1
        if self._refused or self._calls[key] == 1:
            return compute(read.to(self._device))
        with torch.cuda.device(self._device):
            outputs = self._without_waiting(key, read, compute)
        return compute(read.to(self._device)) if outputs is None else outputs

    @property
    def _refused(self) -> bool:
        return self._device.type != "cuda" or self._model in _refusing

    def _without_waiting(
        self, key: Hashable, read: torch.Tensor, compute: Compute
    ) -> Outputs | None:
        """Compute without waiting for the GPU, recorded if the key is known; None if refused."""
        try:
            if self._calls[key] == 2:
                place = read.to(self._device)
                with _no_waiting():
                    return compute(place)
            if key not in self._recorded:
                self._recorded[key] = self._record(read, compute)
        except RuntimeError:
            _refusing.add(self._model)
            self.forget()
            return None
        recording = self._recorded[key]
        recording.read.copy_(read)
        recording.graph.replay()
        return recording.outputs

    def _record(self, read: torch.Tensor, compute: Compute) -> _Recording:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        place, stream = read.to(self._device), torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = compute(place)
        finally:
            torch.cuda.set_stream(stream)  # a failed recording leaves its own
        return _Recording(graph, place, outputs)


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside the block, what would wait for the GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
