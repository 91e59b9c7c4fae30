"""The safetensors format, without torch: named tensors and a header with text metadata.

Nothing here knows about LoRA. The reader accepts what safetensors' own reader accepts; the writer
fixes what the format leaves open (the order of the header's keys and of the tensors), so that equal
tensors give equal bytes.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, Protocol, TypedDict, TypeGuard

from lorakit.adapters.foreign import refuse_other_bytes
from lorakit.adapters.tensors import ITEM_SIZES, Tensor
from lorakit.errors import LorakitError
from lorakit.files import explain
from lorakit.foreign_text import parse_json, quote

_ALIGNMENT = 8
_LARGEST_HEADER = 1 << 24  # bytes; safetensors' own limit, 100 MB, takes JSON to 2 GB of memory
_MOST_DIMENSIONS = 32
_LARGEST_NUMBER = 1 << 63  # of bytes, or of values along a dimension


def read_tensors(source: bytes | Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of safetensors bytes; a path is mapped, not read.

    `name` is what messages call the file. Raises LorakitError for anything that is not a complete,
    valid safetensors file. The values are not checked.
    """
    data = memoryview(source) if isinstance(source, bytes) else _map_file(source, name)
    if bytes(data[8:9]) != b"{":  # not safetensors; the 8 bytes before it may be any number
        refuse_other_bytes(bytes(data[:512]), name)
    header, start = _read_header(data, name)
    metadata = _check_metadata(header.pop("__metadata__", None), name)
    body = data[start:]
    infos = {key: _check_entry(key, entry, name) for key, entry in header.items()}
    _check_layout(infos, len(body), name)
    tensors = {
        key: Tensor(info.dtype, info.shape, body[info.first : info.last], start + info.first)
        for key, info in infos.items()
    }
    return tensors, metadata


class _TensorInfo(NamedTuple):
    """What the header says about a tensor: bytes first … last after the header are its values."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


def _map_file(path: Path, name: str) -> memoryview:
    """Return the bytes of a file, mapped into memory if possible."""
    try:
        with open(path, "rb") as stream:
            if not path.is_file():  # a pipe such as /dev/fd/63 cannot be mapped
                return memoryview(stream.read())
            if path.stat().st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise LorakitError(f"cannot read {name}: {explain(error)}; check the path") from error


def _refuse(name: str, reason: str) -> NoReturn:
    """Raise LorakitError for a file whose bytes contradict the format."""
    raise LorakitError(
        f"{name} is not a sound safetensors file ({reason}); copy or download it again"
    )


def _read_header(data: memoryview, name: str) -> tuple[dict[str, object], int]:
    """Return the header, checked only to be an object, and the offset where the tensors begin."""
    if len(data) < 8:
        _refuse(name, f"only {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > _LARGEST_HEADER:
        _refuse(name, f"its first 8 bytes are no header length up to {_LARGEST_HEADER}")
    if 8 + length > len(data):
        _refuse(name, f"cut short: {len(data)} bytes, the header alone needs {8 + length}")
    try:
        header: object = parse_json(str(data[8 : 8 + length], "utf-8"))
    except ValueError as error:
        _refuse(name, f"its header is not JSON: {error}")
    if not isinstance(header, dict):
        _refuse(name, "its header is not a JSON object")
    return header, 8 + length


def _check_metadata(metadata: object, name: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(name, "its __metadata__ is not an object of texts")
    return metadata


def _check_entry(key: str, entry: object, name: str) -> _TensorInfo:
    """Return what the header's `entry` says about the tensor `key`, checked by itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(name, f"the entry of tensor {quote(key)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise LorakitError(
            f"{name}: tensor {quote(key)} is {quote(str(dtype))}, a format lorakit does not know; "
            "cast it to float32, float16 or bfloat16"
        )
    if not _are_naturals(shape) or not _are_naturals(offsets) or len(offsets) != 2:
        _refuse(name, f"shape or offsets of tensor {quote(key)} are not natural numbers")
    if len(shape) > _MOST_DIMENSIONS:
        _refuse(name, f"tensor {quote(key)} has {len(shape)} dimensions")
    first, last = offsets
    if last - first != math.prod(shape) * ITEM_SIZES[dtype]:
        _refuse(name, f"shape and length of tensor {quote(key)} disagree")
    return _TensorInfo(dtype, tuple(shape), first, last)


def _are_naturals(value: object) -> TypeGuard[list[int]]:
    """Return whether a value is a list of integers that a file's sizes can be."""
    return isinstance(value, list) and all(
        type(x) is int and 0 <= x < _LARGEST_NUMBER for x in value
    )


def _check_layout(infos: Mapping[str, _TensorInfo], size: int, name: str) -> None:
    """Check that the tensors fill the `size` bytes after the header, without gap or overlap."""
    position = 0
    for key, info in sorted(infos.items(), key=lambda item: item[1][2:]):
        if info.first != position:
            _refuse(name, f"tensor {quote(key)} does not follow the one before it")
        position = info.last
    if position > size:
        _refuse(name, f"cut short: {size} bytes of tensors, {position} expected")
    if position < size:
        _refuse(name, f"{size - position} bytes too many at its end")


class Stored(Protocol):
    """What write_tensors writes: a number format, a shape, and the bytes in pieces."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def pieces(self) -> Iterator[memoryview]: ...


def write_tensors(
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str],
    stream: BinaryIO,
    *,
    late: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write safetensors bytes, one tensor at a time; equal input gives equal bytes.

    The header's keys are sorted and it is padded to a multiple of 8 bytes. As in safetensors' own
    writer, tensors are ordered by falling item size, then name, which keeps them aligned. `late`,
    for a seekable stream, is called for the final metadata once the tensors are written; `metadata`
    is a placeholder of the same length.
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


def _head(
    tensors: Mapping[str, Stored], order: Sequence[str], metadata: Mapping[str, str]
) -> bytes:
    """Return the bytes before the tensors: the length of the header and the header."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    header |= dict(_entries(tensors, order))
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class _Entry(TypedDict):
    """A tensor's entry in the header, as it is written."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def _entries(tensors: Mapping[str, Stored], order: Sequence[str]) -> Iterator[tuple[str, _Entry]]:
    """Yield the header's entry for each tensor, laying the tensors one after the other."""
    position = 0
    for key in order:
        tensor = tensors[key]
        last = position + math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype]
        yield (
            key,
            {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, last],
            },
        )
        position = last
