"""LoRA adapters: one A and one B for each module they change, read, checked and written.

It knows PEFT's names and files, without torch, and reads only what it can keep exactly: whatever
else is in a file is refused by name, never dropped. What the config means is in peft_config.py,
the bytes in tensorfile.py, lorakit's own header in header.py, the hub in hub.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import LorakitError
from lorakit.files import STDIO, atomic_path, explain, open_input, refuse_terminal
from lorakit.foreign import quote, refuse_folder, refuse_tensor
from lorakit.header import header_text, parse_header
from lorakit.layers import layer_of, natural_key
from lorakit.peft_config import config_text, is_targeted, parse_config, rank_of, scale_of
from lorakit.tensorfile import (
    FLOATS,
    FloatArray,
    Tensor,
    read_tensors,
    write_tensors,
)

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
HUB = "hf://"

Factor = Literal["A", "B"]

_PREFIX = "base_model.model."
_LORA_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class LoraModule:
    """A view of one A/B pair: `module`'s weights change by s·B·A.

    `a` (r × d_in) and `b` (d_out × r) are float32 and read-only; F32 tensors are not copied, others
    are widened anew at each access, so that a whole adapter never stands in memory twice.
    """

    name: str
    layer: int | None
    tensor_a: Tensor
    tensor_b: Tensor
    scale: float

    @property
    def a(self) -> FloatArray:
        return self.tensor_a.array()

    @property
    def b(self) -> FloatArray:
        return self.tensor_b.array()

    @property
    def rank(self) -> int:
        return self.tensor_a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of ΔW, (d_out, d_in)."""
        return self.tensor_b.shape[0], self.tensor_a.shape[1]

    def delta(self) -> NDArray[np.float64]:
        """Return ΔW = s·B·A (d_out × d_in), dense, computed in float64."""
        product: NDArray[np.float64] = self.b.astype(np.float64) @ self.a.astype(np.float64)
        return self.scale * product

    def norm(self) -> float:
        """Return the Frobenius norm of ΔW, |s|·√tr((BᵀB)(AAᵀ)), without the dense ΔW."""
        return abs(self.scale) * product_norm(self.a, self.b)


@dataclass(frozen=True)
class Adapter:
    """An adapter: tensors by PEFT's names, PEFT's config, and lorakit's header ({} for others').

    `name` is what messages call it. Operations return a new one; nothing here is changed in place.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    header: Mapping[str, Any] = field(default_factory=dict)
    name: str = "the adapter"

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of what the adapter computes: its config's text, its tensors' own SHA-256.

        Header, file layout and the order of keys are left out, so that the single file and the
        folder of one adapter have one hash, and so has an adapter written again. Raises
        LorakitError for a value that is not finite.
        """
        hashes = _finite_hashes(self.tensors, self.name)
        listed = sorted(self.tensors.items())
        told = [[key, tensor.dtype, tensor.shape, hashes[key]] for key, tensor in listed]
        return hashlib.sha256((config_text(self.config) + json.dumps(told)).encode()).hexdigest()

    def modules(self) -> list[LoraModule]:
        """Return the A/B pairs by layer, then name; cheap, since values are converted on access."""
        return list(self._modules)

    @functools.cached_property
    def _modules(self) -> tuple[LoraModule, ...]:
        return tuple(self._module(name) for name in sorted(_names(self.tensors), key=natural_key))

    def _module(self, name: str) -> LoraModule:
        a, b = (self.tensors[lora_name(name, factor)] for factor in ("A", "B"))
        return LoraModule(name, layer_of(name), a, b, scale_of(self.config, name))


def lora_name(module: str, factor: Factor) -> str:
    """Return PEFT's name of the tensor that is A or B of `module`."""
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def product_norm(a: FloatArray, b: FloatArray) -> float:
    """Return the Frobenius norm of B·A for A (r × d_in) and B (d_out × r), in float64."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    square = float(np.sum((b64.T @ b64) * (a64 @ a64.T)))
    return math.sqrt(max(square, 0.0))


def _names(tensors: Mapping[str, Tensor]) -> set[str]:
    matches = (_LORA_NAME.fullmatch(key) for key in tensors)
    return {match["module"] for match in matches if match}


def load_adapter(source: str, *, check_values: bool = True) -> Adapter:
    """Return the adapter in a file, a PEFT folder, `-` (stdin) or `hf://owner/name[@revision]`.

    A tensor file beside an adapter_config.json is read with it where it is named as PEFT names it
    or has no config of its own. Where the two configs differ the folder's counts, as in PEFT: it
    is the one people edit. Raises LorakitError for all that cannot be kept exactly; for values that
    are not finite only when the hash is asked for, where `check_values` is false.
    """
    adapter = _open(source)
    if check_values:
        _ = adapter.sha256  # looks at every value
    return adapter


def _open(source: str) -> Adapter:
    if source == STDIO:
        return _load(open_input(STDIO).read(), "stdin", None)
    if source.startswith(HUB):
        from lorakit.hub import fetch_adapter

        return _load_folder(fetch_adapter(source, CONFIG_FILE, TENSOR_FILE), source)
    path = Path(source)
    if path.is_dir():
        return _load_folder(path, source or ".")
    sibling = path.parent / CONFIG_FILE
    return _load(path, source, sibling if sibling.is_file() else None)


def _load_folder(folder: Path, name: str) -> Adapter:
    tensors, config = folder / TENSOR_FILE, folder / CONFIG_FILE
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if TENSOR_FILE not in found:
        if CONFIG_FILE in found:
            parse_config(_read(config), str(config))  # its fault is the better message
        refuse_folder(found, name)
    return _load(tensors, name, config if CONFIG_FILE in found else None)


def _read(path: Path) -> bytes:
    with open_input(str(path)) as stream:
        return stream.read()


def _load(source: bytes | Path, name: str, config_file: Path | None) -> Adapter:
    tensors, metadata = read_tensors(source, name)
    _check_names(tensors, name)
    inner = metadata.get("adapter_config")
    standard = isinstance(source, Path) and source.name == TENSOR_FILE
    if config_file is not None and (standard or inner is None):
        config = parse_config(_read(config_file), str(config_file))
    elif inner is not None:
        config = parse_config(inner, f"{name}: its adapter_config")
    else:
        raise LorakitError(f"{name} has no config; put PEFT's {CONFIG_FILE} beside it")
    _check_tensors(tensors, config, name)
    ranks = {module: tensors[lora_name(module, "A")].shape[0] for module in _names(tensors)}
    header = parse_header(metadata.get("lorakit", "{}"), ranks, name)
    return Adapter(tensors, config, header, name)


def _check_names(tensors: Mapping[str, Tensor], name: str) -> None:
    if not tensors:
        raise LorakitError(f"{name} holds no tensors; check what wrote it")
    for key in sorted(tensors):
        match = _LORA_NAME.fullmatch(key)
        if match is None:
            refuse_tensor(key, name)
        other: Factor = "B" if match["factor"] == "A" else "A"
        if lora_name(match["module"], other) not in tensors:
            raise LorakitError(f"{name}: tensor {quote(key)} has no {other}; take a new copy")


def _check_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> None:
    for key in sorted(tensors):
        _check_tensor(tensors[key], f"{name}: tensor {quote(key)}")
    for module in sorted(_names(tensors), key=natural_key):
        _check_module(module, tensors, config, name)


def _check_tensor(tensor: Tensor, where: str) -> None:
    if tensor.dtype not in FLOATS:
        raise LorakitError(f"{where} is {tensor.dtype}; cast it to float32, float16 or bfloat16")
    if len(tensor.shape) != 2:
        raise LorakitError(
            f"{where} has {len(tensor.shape)} dimensions; lorakit reads LoRA on linear layers only"
        )


def _finite_hashes(tensors: Mapping[str, Tensor], name: str) -> dict[str, str]:
    """Return the SHA-256 of every tensor; all have finite values.

    Tensors are looked at and hashed in one pass, side by side, one on each core: of all that is
    done to an adapter it takes the longest.
    """
    from concurrent.futures import ThreadPoolExecutor

    keys = sorted(tensors)
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(Tensor.finite_sha256, (tensors[key] for key in keys))
        for key, digest in zip(keys, found, strict=True):
            if digest is None:
                where = f"{name}: tensor {quote(key)}"
                raise LorakitError(f"{where} holds values that are not finite; train it again")
            hashes[key] = digest
    return hashes


def _check_module(
    module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> None:
    key_a, key_b = lora_name(module, "A"), lora_name(module, "B")
    a, b, rank = tensors[key_a].shape, tensors[key_b].shape, rank_of(config, module)
    if a[0] != rank or b[1] != rank:
        raise LorakitError(
            f"{name}: {quote(module)} has A of shape {a} and B of shape {b}, but the config gives "
            f"it rank {rank}; mend r or rank_pattern"
        )
    if 0 in a + b:
        raise LorakitError(f"{name}: {quote(module)} has A of shape {a}, B of {b}; check them")
    if not is_targeted(config, module):
        raise LorakitError(
            f"{name}: tensor {quote(key_a)} is not targeted by the config, and PEFT would drop it; "
            "mend target_modules"
        )


def save_adapter(
    adapter: Adapter, output: str, *, late: Callable[[], Adapter] | None = None
) -> str:
    """Write `adapter` as one file, to stdout (`-`) or as a PEFT folder; return `output`.

    A folder is meant by a trailing slash or one that exists. Files are replaced whole. In a folder
    the old config goes before the new tensors come, so that a kill between the two never leaves
    one adapter's tensors beside another's config; the tensor file's own header still has its own.
    `late` gives the adapter once more with its header complete, no longer than before: it is asked
    while the tensors are on their way to a file, and first of all where they go to a pipe.
    """
    if output == STDIO:
        refuse_terminal("an adapter")
        _write_stream(late() if late else adapter, output)
    elif output.endswith(("/", os.sep)) or Path(output).is_dir():
        _save_folder(adapter, Path(output), late)
    elif Path(output).exists() and not Path(output).is_file():
        # a device or a named pipe has no side file
        _write_stream(late() if late else adapter, output)
    else:
        with atomic_path(output) as side, open(side, "wb") as stream:
            _write(adapter, stream, late)
    return output


def _write(adapter: Adapter, stream: BinaryIO, late: Callable[[], Adapter] | None = None) -> None:
    def metadata_of(late: Callable[[], Adapter]) -> dict[str, str]:
        stream.flush()
        os.fsync(stream.fileno())  # the disk works while the rest of the header comes about
        return _metadata(late())

    at_last = functools.partial(metadata_of, late) if late else None
    write_tensors(adapter.tensors, _metadata(adapter), stream, late=at_last)
    stream.flush()


def _metadata(adapter: Adapter) -> dict[str, str]:
    metadata = {"adapter_config": config_text(adapter.config), "format": "pt"}
    if adapter.header:
        metadata["lorakit"] = header_text(adapter.header)
    return metadata


def _write_stream(adapter: Adapter, output: str) -> None:
    try:
        with contextlib.ExitStack() as stack:
            to_stdout = output == STDIO
            stream = sys.stdout.buffer if to_stdout else stack.enter_context(open(output, "wb"))
            _write(adapter, stream)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LorakitError(f"cannot write {output}: {explain(error)}; choose another -o") from error


def _save_folder(adapter: Adapter, folder: Path, late: Callable[[], Adapter] | None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LorakitError(f"cannot write {folder}: {explain(error)}; choose another -o") from error
    config = folder / CONFIG_FILE
    text = (config_text(adapter.config) + "\n").encode()
    with atomic_path(config) as config_side, atomic_path(folder / TENSOR_FILE) as tensor_side:
        config_side.write_bytes(text)
        with open(tensor_side, "wb") as stream:
            _write(adapter, stream, late)
            os.fsync(stream.fileno())
        if config.is_file() and config.read_bytes() != text:
            config.unlink()
