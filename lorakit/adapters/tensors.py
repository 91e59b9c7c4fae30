"""One tensor as a file holds it: bytes in a number format, converted to float32 and back.

This module knows neither files nor LoRA. To add a number format, add a line to ITEM_SIZES; those
that lorakit can compute with are in FLOATS.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lorakit.errors import LorakitError

FloatArray = NDArray[np.float32]
Pair = tuple[FloatArray, FloatArray]  # A (rank × d_in) and B (d_out × rank) of one module

ITEM_SIZES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
FLOATS: Mapping[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

# For each, the unsigned format of the same width and the bits of the exponent, all of which are set
# in infinities and NaNs alone.
_EXPONENTS: Mapping[str, tuple[str, int]] = {
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_PIECE = 1 << 19  # bytes read at a time, few enough that they and what they become stay in cache
_READ_AROUND = 1 << 16  # bytes on either side of a read that Linux may map as well


@dataclass(frozen=True)
class Tensor:
    """One array as a file holds it: C order, little-endian, possibly a view into a mapped file.

    `offset` is where it begins in that file, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    offset: int = field(default=0, compare=False)

    def array(self) -> FloatArray:
        """Return the values as float32: read-only and without a copy for F32, else widened exactly.

        Raises LorakitError for a format that is not F32, F16 or BF16.
        """
        if self.dtype not in FLOATS:
            raise LorakitError(f"cannot compute with {self.dtype}; cast the tensor to float32")
        raw = np.frombuffer(self.data, dtype=FLOATS[self.dtype])
        if self.dtype == "BF16":
            raw = (raw.astype("<u4") << np.uint32(16)).view("<f4")
        values = raw.astype(np.float32, copy=False)
        values.flags.writeable = False
        return values.reshape(self.shape)

    @classmethod
    def from_array(cls, array: ArrayLike, dtype: str = "F32") -> Tensor:
        """Return `array` as a tensor of `dtype`, rounded to nearest (ties to even)."""
        values = np.asarray(array, dtype=np.float32)
        if dtype == "BF16":
            stored: NDArray[np.generic] = _to_bfloat16(values)
        elif dtype in FLOATS:
            with np.errstate(over="ignore"):
                stored = values.astype(FLOATS[dtype])
        else:
            raise LorakitError(f"cannot write {dtype}; use one of {', '.join(FLOATS)}")
        return cls(dtype, values.shape, memoryview(stored.tobytes()))

    @classmethod
    def exactly(cls, values: FloatArray, dtype: str) -> Tensor:
        """Return the values in the format `dtype`, or in F32 if that cannot hold them exactly."""
        tensor = cls.from_array(values, dtype)
        return tensor if np.array_equal(tensor.array(), values) else cls.from_array(values)

    def pieces(self) -> Iterator[memoryview]:
        """Yield the data in pieces, releasing the memory of each when the next is requested."""
        for first in range(0, len(self.data), _PIECE):
            piece = self.data[first : first + _PIECE]
            yield piece
            self._release(first, len(piece))

    def finite_sha256(self) -> str | None:
        """Return the SHA-256 of F32, F16 or BF16 data; None if it has a NaN or an infinity."""
        kind, mask = _EXPONENTS[self.dtype]
        exponent = np.dtype(kind).type(mask)
        digest = hashlib.sha256()
        for piece in self.pieces():
            if (np.frombuffer(piece, dtype=kind) & exponent).max() >= exponent:
                return None
            digest.update(piece)
        return digest.hexdigest()

    def zeros(self) -> int:
        """Return how many values are exactly zero."""
        values = self.array()
        return values.size - int(np.count_nonzero(values))

    def release(self) -> None:
        """Release the memory of a mapped file; it is read from the file again when needed."""
        self._release(0, len(self.data))

    def _release(self, first: int, length: int) -> None:
        """Release the pages that hold `length` bytes of the data from `first` on."""
        source = self.data.obj
        if length and isinstance(source, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            end = self.offset + first + length
            start = max(self.offset + first - _READ_AROUND, 0) // mmap.PAGESIZE * mmap.PAGESIZE
            source.madvise(mmap.MADV_DONTNEED, start, end - start)


def _to_bfloat16(values: FloatArray) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16 values, ties to even; a NaN stays one."""
    bits = values.astype("<f4").reshape(-1).view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    nan = np.isnan(values).reshape(-1)
    return np.where(nan, quiet_nan, rounded).astype("<u2").reshape(values.shape)
