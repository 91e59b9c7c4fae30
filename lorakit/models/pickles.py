"""PEFT's old tensor file, adapter_model.bin: the one pickle that is read, by `lorakit convert`.

torch's weights-only unpickler reads it, which builds tensors and runs no code of the file's.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import CONFIG_FILE, build_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from lorakit.foreign_text import quote
from lorakit.models.devices import DTYPES

_FORMATS = {dtype: stored for stored, dtype in DTYPES.items()}
_READ_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError)


def load_pickled_adapter(path: Path, name: str) -> Adapter:
    """Return the adapter in a pickle with PEFT's config beside it; `name` is for messages.

    Raises LorakitError for a pickle of anything but tensors by name, and as load_adapter does.
    """
    config = path.parent / CONFIG_FILE
    if not config.is_file():
        raise LorakitError(f"{name} has no config; put PEFT's {CONFIG_FILE} beside it")
    adapter = build_adapter(_read_pickle(path, name), {}, config, name)
    _ = adapter.sha256  # raises an error for values that are not finite
    return adapter


def _read_pickle(path: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors in a pickle, their bytes as they are."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols that torch does not write
            state: object = torch.load(path, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        raise LorakitError(
            f"{name} is no pickle of tensors alone ({type(error).__name__}), and lorakit runs no "
            "code of a file's; ask its author for safetensors"
        ) from error
    if not isinstance(state, dict):
        raise LorakitError(f"{name} holds no tensors by name; give PEFT's adapter_model.bin")
    return {
        str(key): _as_stored(value, f"{name}: tensor {quote(str(key))}")
        for key, value in state.items()
    }


def _as_stored(value: object, where: str) -> Tensor:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise LorakitError(f"{where} is no dense tensor; give a PEFT adapter")
    if value.dtype not in _FORMATS:
        raise LorakitError(f"{where} is {value.dtype}; cast it to float32, float16 or bfloat16")
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Tensor(_FORMATS[value.dtype], tuple(value.shape), memoryview(raw))
