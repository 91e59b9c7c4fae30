"""Adapters of MLX (mlx-lm): folders with `adapters.safetensors` and a config of MLX's own.

MLX computes y = W·x + s·(x·a)·b with a (d_in × r) and b (r × d_out), so that PEFT's A is aᵀ and its
B is bᵀ. Transposing moves bytes and rounds nothing, so both ways are exact. The config names the
factor s itself, not PEFT's alpha = s·r, and the modules by their place within a layer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any  # values of MLX's config

import numpy as np

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import Config
from lorakit.adapters.history import header_text
from lorakit.adapters.names import FACTORS, layer_of, lora_name, natural_key
from lorakit.adapters.portable import make_portable
from lorakit.adapters.safetensors import read_tensors, write_tensors
from lorakit.adapters.storage import CONFIG_FILE, check_adapter
from lorakit.adapters.targets import peft_config
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from lorakit.files import atomic_path, made_folders, open_input
from lorakit.foreign_text import parse_json, quote

MLX_FILE = "adapters.safetensors"
_ENDS = {".lora_a": "A", ".lora_b": "B"}
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


# — Reading —


def find_mlx(source: str) -> Path | None:
    """Return the tensor file of an MLX adapter in a folder, or that is `source`; else None.

    Its config, beside it, has `lora_parameters` or `fine_tune_type`, and no `peft_type`.
    """
    path = Path(source)
    file = path / MLX_FILE if path.is_dir() else path
    config = file.parent / CONFIG_FILE
    if file.suffix != ".safetensors" or not file.is_file() or not config.is_file():
        return None
    with contextlib.suppress(ValueError):
        fields = parse_json(_read(config).decode("utf-8"))
        if isinstance(fields, dict) and "peft_type" not in fields:
            is_mlx = "lora_parameters" in fields or "fine_tune_type" in fields
            return file if is_mlx else None
    return None


def load_mlx(file: Path, name: str) -> Adapter:
    """Return the adapter in an MLX tensor file with MLX's config beside it, in PEFT's form.

    Tensors keep their number format. Raises LorakitError, naming the tensor or key, for DoRA, full
    fine-tuning, LoRA on embeddings or experts, and for what is no LoRA at all.
    """
    path = file.parent / CONFIG_FILE
    fields = parse_json(_read(path).decode("utf-8"))
    scale, dropout = _parameters(fields, str(path))
    stored, metadata = read_tensors(file, name)
    tensors = {}
    for key, tensor in stored.items():
        tensors[_peft_name(key, name)] = _transposed(tensor, f"{name}: tensor {quote(key)}")
    config = _config(tensors, scale=scale, dropout=dropout, base=_base(fields))
    adapter = check_adapter(tensors, config, {"lorakit": metadata.get("lorakit", "{}")}, name)
    _ = adapter.sha256  # raises an error for values that are not finite
    return adapter


def _read(path: Path) -> bytes:
    with open_input(str(path)) as stream:
        return stream.read()


def _parameters(fields: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Return the scale and the dropout in MLX's config; LorakitError for another kind of tuning."""
    kind = fields.get("fine_tune_type", "lora")
    if kind != "lora":
        raise LorakitError(
            f"{name}: fine_tune_type is {quote(str(kind))}, and only 'lora' can be converted; "
            "train the adapter as plain LoRA"
        )
    parameters = fields.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    dropout = parameters.get("dropout", 0.0) if isinstance(parameters, dict) else None
    for key, value in {"scale": scale, "dropout": dropout}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:
            raise LorakitError(f"{name}: lora_parameters has no number `{key}`; mend it")
    return float(scale or 0), float(dropout or 0)


def _base(fields: Mapping[str, Any]) -> str | None:
    model = fields.get("model")
    return model if isinstance(model, str) else None


def _peft_name(key: str, name: str) -> str:
    """Return PEFT's name of MLX's tensor `key`; LorakitError for one that is no LoRA factor."""
    for end, factor in _ENDS.items():
        module = key.removesuffix(end)
        if module != key and not module.endswith("embed_tokens"):
            return lora_name(module, "A" if factor == "A" else "B")
    reason = "is LoRA on an embedding" if key.endswith(tuple(_ENDS)) else "is no lora_a or lora_b"
    raise LorakitError(f"{name}: tensor {quote(key)} {reason}; train plain LoRA on linear layers")


def _transposed(tensor: Tensor, where: str) -> Tensor:
    """Return the tensor with rows and columns exchanged, its numbers' bytes as they are."""
    if tensor.dtype not in _SIZES:
        raise LorakitError(f"{where} is {tensor.dtype}; cast it to float32, float16 or bfloat16")
    if len(tensor.shape) != 2:
        raise LorakitError(
            f"{where} has {len(tensor.shape)} dimensions; only LoRA on linear layers is converted"
        )
    numbers = np.frombuffer(tensor.data, f"u{_SIZES[tensor.dtype]}").reshape(tensor.shape)
    rows, columns = tensor.shape
    return Tensor(tensor.dtype, (columns, rows), memoryview(numbers.T.tobytes()))


def _config(
    tensors: Mapping[str, Tensor], *, scale: float, dropout: float, base: str | None
) -> Config:
    """Return PEFT's config that selects exactly the modules of these tensors, at this scale."""
    ranks = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor.shape[0]
        for key, tensor in tensors.items()
        if key.endswith(".lora_A.weight")
    }
    config = peft_config(ranks, base=base, dropout=dropout)
    usual = config["r"]
    alphas = {name: scale * rank for name, rank in ranks.items() if rank != usual}
    config = {**config, "lora_alpha": scale * usual, "alpha_pattern": alphas}
    return {**config, **_by_layer(ranks)}


def _by_layer(modules: Mapping[str, object]) -> dict[str, object]:
    """Return target_modules and layers_to_transform, where all layers have the same modules."""
    inner: dict[int, set[str]] = {}
    for module in modules:
        if (layer := layer_of(module)) is None:
            return {}
        inner.setdefault(layer, set()).add(module.partition(f".{layer}.")[2])
    if len({frozenset(names) for names in inner.values()}) != 1:
        return {}
    names = next(iter(inner.values()))
    return {"target_modules": sorted(names), "layers_to_transform": sorted(inner)}


# — Writing —


def save_mlx(adapter: Adapter, folder: str) -> None:
    """Write an adapter as an MLX folder, whose files are replaced whole.

    MLX knows one rank and one scale: an adapter with several gets the highest rank, padded with
    zeros, and scale 1. lorakit's header stays in the tensor file's metadata, which MLX ignores.
    Raises LorakitError where the folder cannot be written.
    """
    shapes = {(module.rank, module.scale) for module in adapter.modules()}
    if len(shapes) > 1:
        adapter = make_portable(adapter)
    metadata = {"format": "mlx"}
    if adapter.header:
        metadata["lorakit"] = header_text(adapter.header)
    path = Path(folder)
    with made_folders(path, path), contextlib.ExitStack() as sides:
        config = sides.enter_context(atomic_path(path / CONFIG_FILE))
        tensors = sides.enter_context(atomic_path(path / MLX_FILE))
        config.write_text(json.dumps(_mlx_config(adapter), indent=4, sort_keys=True) + "\n")
        with open(tensors, "wb") as stream:
            write_tensors(dict(_mlx_tensors(adapter)), metadata, stream)


def _mlx_tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yield MLX's tensors by name: those of every module, transposed."""
    for module in adapter.modules():
        for factor, tensor in zip(FACTORS, (module.tensor_a, module.tensor_b), strict=True):
            yield f"{module.name}.lora_{factor.lower()}", _transposed(tensor, module.name)


def _mlx_config(adapter: Adapter) -> dict[str, object]:
    """Return MLX's config of an adapter of one rank and scale.

    `num_layers` -1 means all layers, of which those without tensors keep a LoRA that is zero:
    MLX counts layers from the top, and how many there are is the base's to know.
    """
    first = adapter.modules()[0]
    keys = {_within_layer(module.name) for module in adapter.modules()}
    return {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": adapter.config.get("lora_dropout") or 0.0,
            "keys": sorted(keys, key=natural_key),
            "rank": first.rank,
            "scale": first.scale,
        },
        "model": adapter.config.get("base_model_name_or_path"),
        "num_layers": -1,
    }


def _within_layer(module: str) -> str:
    """Return a module's name within its layer, `self_attn.q_proj`, or all of it outside them."""
    layer = layer_of(module)
    return module if layer is None else module.partition(f".{layer}.")[2]
