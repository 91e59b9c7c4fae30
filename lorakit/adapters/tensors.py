"""safetensors bytes in and out: named arrays and a header of texts, without torch.

It knows the container and nothing of LoRA. A number format is one line in ITEM_SIZES; those that
can be computed with are in FLOATS. The reader accepts what safetensors' own reader accepts; the
writer fixes what that leaves open (the order of the header's keys and of the tensors), so that
equal tensors are equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from lorakit.adapters.foreign import quote, refuse_other_bytes
from lorakit.errors import LorakitError
from lorakit.files import explain

FloatArray = NDArray[np.float32]

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

# The bits of the exponent: all of them are set in infinities and NaNs, and in nothing else.
_EXPONENTS: Mapping[str, tuple[str, int]] = {
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_PIECE = 1 << 19  # bytes looked at together: they and what is computed of them stay in the cache
_AROUND = 1 << 16  # bytes that Linux may map on either side of what is read
_ALIGNMENT = 8
_LARGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Tensor:
    """One array as it stands in the file: C order, little-endian, possibly a view into the file.

    `offset` is where it begins in the file that is mapped.
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
    def from_array(cls, array: NDArray[Any], dtype: str = "F32") -> Tensor:
        """Return `array` as a tensor of `dtype`, rounded to the nearest (ties to even)."""
        values = np.asarray(array, dtype=np.float32)
        if dtype == "BF16":
            values = _to_bfloat16(values)
        elif dtype in FLOATS:
            with np.errstate(over="ignore"):
                values = values.astype(FLOATS[dtype])
        else:
            raise LorakitError(f"cannot write {dtype}; use one of {', '.join(FLOATS)}")
        return cls(dtype, values.shape, memoryview(values.tobytes()))

    def pieces(self) -> Iterator[memoryview]:
        """Yield the data in pieces, giving the memory of each back once the next is asked for."""
        for first in range(0, len(self.data), _PIECE):
            piece = self.data[first : first + _PIECE]
            yield piece
            self._release(first, len(piece))

    def finite_sha256(self) -> str | None:
        """Return the SHA-256 of the data of an F32, F16 or BF16; None for a NaN or an infinity."""
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
        """Give the memory of a mapped file back; whoever looks at its data again reads it again."""
        self._release(0, len(self.data))

    def _release(self, first: int, length: int) -> None:
        source = self.data.obj
        if length and isinstance(source, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            end = self.offset + first + length
            start = max(self.offset + first - _AROUND, 0) // mmap.PAGESIZE * mmap.PAGESIZE
            source.madvise(mmap.MADV_DONTNEED, start, end - start)


def _to_bfloat16(values: FloatArray) -> NDArray[Any]:
    bits = values.astype("<f4").reshape(-1).view("<u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    nan = np.isnan(values).reshape(-1)
    return np.where(nan, quiet_nan, rounded).astype("<u2").reshape(values.shape)


def read_tensors(source: bytes | Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of safetensors bytes; a path is mapped, not read.

    `name` is what messages call the file. Raises LorakitError for whatever is not a whole, sound
    safetensors file. The values are not looked at.
    """
    data = memoryview(source) if isinstance(source, bytes) else _map_file(source, name)
    if bytes(data[8:9]) != b"{":  # the length before it may look like any magic number
        refuse_other_bytes(bytes(data[:512]), name)
    header, start = _read_header(data, name)
    metadata = _check_metadata(header.pop("__metadata__", None), name)
    body = data[start:]
    spans = {key: _check_entry(key, entry, name) for key, entry in header.items()}
    _check_layout(spans, len(body), name)
    tensors = {
        key: Tensor(dtype, shape, body[first:last], start + first)
        for key, (dtype, shape, first, last) in spans.items()
    }
    return tensors, metadata


Span = tuple[str, tuple[int, ...], int, int]


def _map_file(path: Path, name: str) -> memoryview:
    try:
        with open(path, "rb") as stream:
            if not path.is_file():  # a pipe such as /dev/fd/63 cannot be mapped
                return memoryview(stream.read())
            if path.stat().st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise LorakitError(f"cannot read {name}: {explain(error)}; check the path") from error


def _bad(name: str, reason: str) -> NoReturn:
    raise LorakitError(
        f"{name} is not a sound safetensors file ({reason}); copy or download it again"
    )


def _read_header(data: memoryview, name: str) -> tuple[dict[str, Any], int]:
    if len(data) < 8:
        _bad(name, f"only {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > _LARGEST_HEADER:
        _bad(name, "its first 8 bytes are no header length")
    if 8 + length > len(data):
        _bad(name, f"cut short: {len(data)} bytes, the header alone needs {8 + length}")
    try:
        header = parse_json(str(data[8 : 8 + length], "utf-8"))
    except ValueError as error:
        _bad(name, f"its header is not JSON: {error}")
    if not isinstance(header, dict):
        _bad(name, "its header is not a JSON object")
    return header, 8 + length


def parse_json(text: str) -> Any:
    """Parse JSON strictly.

    Raises ValueError also for a key given twice, for nesting that is too deep and for text that
    UTF-8 cannot hold (half a surrogate pair), which could not be written again.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{quote(key)} stands in it twice")
        result[key] = value
    return result


def _check_metadata(metadata: object, name: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _bad(name, "its __metadata__ is not an object of texts")
    return cast("dict[str, str]", metadata)


def _check_entry(key: str, entry: object, name: str) -> Span:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _bad(name, f"the entry of tensor {quote(key)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise LorakitError(
            f"{name}: tensor {quote(key)} is {quote(str(dtype))}, a format lorakit does not know; "
            "cast it to float32, float16 or bfloat16"
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        _bad(name, f"shape or offsets of tensor {quote(key)} are not natural numbers")
    first, last = offsets
    if last - first != math.prod(shape) * ITEM_SIZES[dtype]:
        _bad(name, f"shape and length of tensor {quote(key)} disagree")
    return dtype, tuple(shape), first, last


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _check_layout(spans: Mapping[str, Span], size: int, name: str) -> None:
    position = 0
    for key, (_, _, first, last) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if first != position:
            _bad(name, f"tensor {quote(key)} does not follow the one before it")
        position = last
    if position > size:
        _bad(name, f"cut short: {size} bytes of tensors, {position} expected")
    if position < size:
        _bad(name, f"{size - position} bytes too many at its end")


def write_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    stream: BinaryIO,
    *,
    late: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write safetensors bytes, one tensor at a time; equal input gives equal bytes.

    The header's keys are sorted and it is padded to 8 bytes; the tensors stand in the order of
    falling item size, then name, which keeps each aligned, as safetensors' own writer has it.
    `late` is asked for the true metadata once the tensors are written, for a stream that can go
    back; `metadata` stands in for it until then and has to be as long.
    """
    order = sorted(tensors, key=lambda key: (-ITEM_SIZES[tensors[key].dtype], key))
    head = _head(tensors, order, metadata)
    stream.write(head)
    for key in order:
        for piece in tensors[key].pieces():
            stream.write(piece)
    if late is not None:
        final = _head(tensors, order, late())
        if len(final) != len(head):
            raise ValueError(f"late metadata needs {len(final)} bytes, not {len(head)}")
        stream.seek(0)
        stream.write(final)


def _head(tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    header |= dict(_entries(tensors, order))
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


Kind = Literal["dtype", "shape", "data_offsets"]


def _entries(
    tensors: Mapping[str, Tensor], order: list[str]
) -> Iterator[tuple[str, dict[Kind, Any]]]:
    position = 0
    for key in order:
        tensor = tensors[key]
        last = position + len(tensor.data)
        yield (
            key,
            {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, last],
            },
        )
        position = last
