"""A computation on a GPU that is repeated in few shapes, recorded once for each (CUDA graphs).

A step of decoding launches hundreds of kernels, most of which take the GPU less time than Python
takes to launch them. Recorded, they are launched at once:

    call 1, 2   computed as always, which also sets up what the kernels need
    call 3      recorded, then replayed
    call 4 …    the input is copied to where the recording reads it, and replayed

What is recorded reads and writes the same places in memory whenever it is replayed. Whoever moves
what it reads calls `forget`. A computation that cannot be recorded (one that waits for the GPU,
say) is computed as always from then on, and so is everything on other devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

_UNRECORDED = 2  # calls in a shape before it is recorded
Outputs = tuple[torch.Tensor, ...]


class _Recording(NamedTuple):
    """A graph, where it reads its input, and where it leaves its outputs."""

    graph: torch.cuda.CUDAGraph
    read: torch.Tensor
    outputs: Outputs


class StepGraphs:
    """Calls a function of one tensor; `key` says in which shape, and all else that it depends on.

    Outputs hold until the next call.
    """

    def __init__(self, compute: Callable[[torch.Tensor], Outputs], device: torch.device) -> None:
        self._compute, self._device = compute, device
        self._refused = device.type != "cuda"
        self.forget()

    def forget(self) -> None:
        """Drop all recordings."""
        self._calls: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recording] = {}
        self._pool = None if self._refused else torch.cuda.graph_pool_handle()

    @property
    def count(self) -> int:
        """How many shapes are recorded."""
        return len(self._recorded)

    def __call__(self, key: Hashable, read: torch.Tensor) -> Outputs:
        """Return what the function returns for a tensor on the CPU."""
        self._calls[key] += 1
        if self._refused or self._calls[key] <= _UNRECORDED:
            return self._compute(read.to(self._device))
        if key not in self._recorded:
            try:
                self._recorded[key] = self._record(read)
            except RuntimeError:
                self._refused = True
                return self._compute(read.to(self._device))
        recording = self._recorded[key]
        recording.read.copy_(read)
        recording.graph.replay()
        return recording.outputs

    def _record(self, read: torch.Tensor) -> _Recording:
        place = read.to(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._compute(place)
        return _Recording(graph, place, outputs)
