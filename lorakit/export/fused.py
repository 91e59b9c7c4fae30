"""A weight of the base with what an adapter changes of it, computed as it is written.

W0 + s·B·A is summed in float32, in blocks that stay in a processor's cache, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from lorakit.adapters.adapter import LoraModule
from lorakit.adapters.tensors import ITEM_SIZES, Tensor
from lorakit.errors import LorakitError
from lorakit.export.dequantised import Weight
from lorakit.export.dora import row_factors
from lorakit.models.devices import DTYPES

_BLOCK = 1 << 18  # parameters of a weight that are computed at a time: 1 MiB in float32


@dataclass(frozen=True)
class Fused:
    """A tensor that is computed as it is written: a weight plus what a LoRA module changes of it.

    Without a module it is the weight in another number format. With DoRA's magnitude m the sum W is
    m·W/‖W‖, row by row.
    """

    key: str
    weight: Weight
    dtype: str
    module: LoraModule | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes in runs of rows; LorakitError where the format cannot hold a value."""
        for values in self.rows():
            stored = values.to(DTYPES[self.dtype], copy=True)
            if not _is_finite(stored) and _is_finite(values):
                raise LorakitError(f"{self.key} is beyond {self.dtype}; give --dtype float32")
            yield memoryview(stored.view(torch.uint8).numpy().data)
        self.weight.release()

    def rows(self) -> Iterator[torch.Tensor]:
        """Yield the values in runs of rows, float32, as the weight is stored.

        Each is valid until the next is asked for.
        """
        factors = self._row_factors()
        for span, values in self._sums():
            if factors is not None:
                values *= factors if self.transposed else factors[span, None]
            yield values

    def _row_factors(self) -> torch.Tensor | None:
        """Return what DoRA multiplies each output by (d_out,), None for plain LoRA."""
        if self.module is None or self.module.magnitude is None:
            return None
        sums = (values for _, values in self._sums())
        return row_factors(sums, self.module.magnitude, transposed=self.transposed, where=self.key)

    def _sums(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield runs of rows of weight and change, float32, as the weight is stored.

        Each is valid until the next is asked for: all are computed in the same two blocks of
        memory, small enough to stay in a processor's cache.
        """
        count = self.shape[0] if self.shape else 1
        width = math.prod(self.shape[1:])
        rows, change = _rows_of(self.weight, width), self._change()
        most = min(count, max(1, _BLOCK // max(1, width)))
        sums, changes = (torch.empty(most, width) for _ in range(2))
        for first in range(0, count, most):
            span = slice(first, min(first + most, count))
            values = sums[: span.stop - first].copy_(rows(span))
            if change is not None:
                values += change(span, changes[: span.stop - first])
            yield span, values

    def _change(self) -> Callable[[slice, torch.Tensor], torch.Tensor] | None:
        """Return the function that computes some rows of ΔW as the weight is stored, in place."""
        if self.module is None:
            return None
        a, b = (torch.from_numpy(factor.copy()) for factor in (self.module.a, self.module.b))
        scale = self.module.scale
        if self.transposed:
            return lambda rows, out: torch.mm(a[:, rows].T, b.T, out=out).mul_(scale)
        return lambda rows, out: torch.mm(b[rows], a, out=out).mul_(scale)


def _rows_of(weight: Weight, width: int) -> Callable[[slice], torch.Tensor]:
    """Return the function that reads some rows of a weight of that width, in its own format."""
    if not isinstance(weight, Tensor):
        whole = torch.from_numpy(weight.array()).reshape(-1, width)
        return lambda rows: whole[rows]
    size, dtype = width * ITEM_SIZES[weight.dtype], DTYPES[weight.dtype]

    def read(rows: slice) -> torch.Tensor:
        raw = bytearray(weight.data[rows.start * size : rows.stop * size])
        return torch.frombuffer(raw, dtype=dtype).reshape(-1, width)

    return read


def _is_finite(values: torch.Tensor) -> bool:
    """Return whether all values are numbers: a sum that is one, in one pass, says they are."""
    return math.isfinite(float(values.sum(dtype=torch.float32))) or bool(
        torch.isfinite(values).all()
    )


def size_of(tensor: Tensor | Fused) -> int:
    """Return how many bytes a tensor takes in a file."""
    return math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype]
