"""A model's weights as they lie in its folder: tensors by name over one or several safetensors.

Files are mapped, not read. What the names mean is in model_folder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.adapters.safetensors import read_tensors
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from lorakit.foreign_text import parse_json, quote

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of each file, by its name, in order; `name` is what messages call the model."""

    name: str
    files: Mapping[str, Mapping[str, Tensor]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {key: tensor for tensors in self.files.values() for key, tensor in tensors.items()}


def open_weights(folder: Path, name: str) -> WeightFiles:
    """Return the weights in a model's folder: of model.safetensors, or of all that its index names.

    Raises LorakitError for a folder without safetensors weights, for a file that is missing or
    damaged, and for an index that does not say what the files hold.
    """
    if (folder / INDEX).is_file():
        named = _indexed(folder, name)
    elif (folder / SINGLE).is_file():
        named = {SINGLE: None}
    else:
        raise LorakitError(f"{name} has no {SINGLE}; give a folder with safetensors weights")
    return WeightFiles(name, {file: _open(folder, file, keys) for file, keys in named.items()})


def _open(folder: Path, file: str, keys: set[str] | None) -> Mapping[str, Tensor]:
    tensors, _ = read_tensors(folder / file, str(folder / file))
    if keys is not None and tensors.keys() != keys:
        odd = min(tensors.keys() ^ keys)
        raise LorakitError(
            f"{folder / file}: the index and the file disagree on {quote(odd)}; copy both again"
        )
    return tensors


def _indexed(folder: Path, name: str) -> dict[str, set[str] | None]:
    """Return the names of the tensors of each file in the index."""
    path = folder / INDEX
    try:
        index = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LorakitError(f"{path} is not JSON ({error}); take a new copy") from None
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(map(_is_file_name, places.values())):
        raise LorakitError(f"{path} has no weight_map of file names; take a new copy of {name}")
    files: dict[str, set[str] | None] = {}
    for key, file in places.items():
        keys = files.setdefault(file, set())
        if keys is not None:
            keys.add(key)
    return dict(sorted(files.items()))


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value and bool(value)
