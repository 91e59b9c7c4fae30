"""The GGUF format: named fields and tensors, of which one is in memory at a time.

The package gguf lays the file out; it is told what all tensors will be, then gets them one by one.
Fields and tensors stand in the order they come in, so that equal input gives equal bytes.
"""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorakit.adapters.tensors import FloatArray
from lorakit.errors import LorakitError
from lorakit.files import (
    STDIO,
    atomic_path,
    cannot_write,
    check_space,
    is_stream,
    names_folder,
    refuse_terminal,
)
from lorakit.reporting import Reporter, Silent

if TYPE_CHECKING:
    from gguf import GGUFWriter

Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
Fields = Mapping[str, Value]  # by the file's keys
SUFFIX = ".gguf"
BLOCK = 32  # values of a row that Q8_0 stores with one scale


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that is computed when its turn comes: `dtype` is F32, F16, BF16 or Q8_0."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], FloatArray]

    @property
    def size(self) -> int:
        """How many bytes it takes in a file, without padding."""
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.dtype]]
        return math.prod(self.shape) // block * size


def check_gguf_output(output: str) -> None:
    """Raise LorakitError, before the work begins, for an output that is no .gguf file or pipe."""
    if output == STDIO:
        refuse_terminal("a GGUF file")
    elif not is_stream(output) and (names_folder(output) or Path(output).suffix != SUFFIX):
        raise LorakitError(f"GGUF is a single file, and {output} is named as none; end -o in .gguf")


def write_gguf(
    output: str,
    architecture: str,
    fields: Fields,
    tensors: Sequence[GgufTensor],
    *,
    reporter: Reporter | None = None,
) -> None:
    """Write a GGUF file, replaced whole, or to a pipe, by way of a temporary file.

    Raises LorakitError where the disk has too little room, where the file cannot be written, and
    for a value that a tensor's format cannot hold.
    """
    with _path_for(output) as path:
        check_space(path.parent, sum(tensor.size for tensor in tensors), output)
        try:
            _write(path, architecture, fields, tensors, reporter or Silent())
        except OSError as error:
            raise cannot_write(output, _with_reason(error)) from error


def _with_reason(error: OSError) -> OSError:
    """Return the error that numpy raises, without a reason, where not all could be written."""
    if error.errno is not None:
        return error
    return OSError(errno.ENOSPC, "the disk or the quota has room for a part of it only")


@contextlib.contextmanager
def _path_for(output: str) -> Iterator[Path]:
    """Yield the path to write to: a side file of `output`, or one that is then copied to a pipe."""
    if not is_stream(output):
        with atomic_path(output) as side:
            yield side
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{SUFFIX}"
        yield path
        try:
            _copy_to_pipe(path, output)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise cannot_write(output, error) from error


def _copy_to_pipe(path: Path, output: str) -> None:
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open(path, "rb"))
        to_stdout = output == STDIO
        pipe = sys.stdout.buffer if to_stdout else stack.enter_context(open(output, "wb"))
        shutil.copyfileobj(source, pipe)
        pipe.flush()


def _write(
    path: Path,
    architecture: str,
    fields: Fields,
    tensors: Sequence[GgufTensor],
    reporter: Reporter,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in fields.items():
            _add(writer, key, value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.dtype]
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reporter.track(tensors, "writing"):
            writer.write_tensor_data(_stored(tensor))
    finally:
        writer.close()


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    """Add a field; whole numbers are unsigned and of 32 bits, as llama.cpp's own are."""
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _stored(tensor: GgufTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Return a tensor's values in its format, as whole rows."""
    import gguf

    values = np.ascontiguousarray(tensor.values(), dtype=np.float32)
    if values.shape != tensor.shape:
        raise ValueError(f"{tensor.name} has shape {values.shape}, not {tensor.shape}")
    largest = float(np.abs(values).max(initial=0))
    if tensor.dtype in ("F16", "Q8_0") and largest > _LARGEST[tensor.dtype]:
        raise LorakitError(f"{tensor.name} is beyond {tensor.dtype}; give --dtype bfloat16")
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[tensor.dtype])


# A scale of Q8_0 is float16, of a 127th of the largest value of its block.
_LARGEST = {"F16": 65504.0, "Q8_0": 65504.0 * 127}
