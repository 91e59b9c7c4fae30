"""An adapter fused into its base: W0 + ΔW, shard by shard, in a folder that loads as a model.

One tensor is in memory at a time, beside the adapter: shards are mapped, and each tensor goes to
its file as it is computed. ΔW = s·B·A is added in float32 and rounded once. A stopped run leaves
whole shards, with which --resume goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.card import CARD_FILE, model_card_text
from lorakit.adapters.safetensors import write_tensors
from lorakit.adapters.tensors import FLOATS, Tensor
from lorakit.errors import LorakitError
from lorakit.export.dequantised import Files, Weight, check_dequantisable, plain_weights
from lorakit.export.fused import Fused, size_of
from lorakit.export.model_folder import PARTS, ModelFolder
from lorakit.export.weight_files import INDEX, open_weights
from lorakit.files import atomic_path, cannot_write, check_space, explain, made_folders
from lorakit.foreign_text import parse_json
from lorakit.models.devices import DTYPES, FORMATS, one_thread
from lorakit.models.lora import check_fits
from lorakit.models.whole import check_whole_fits
from lorakit.reach import MODEL_CONFIG
from lorakit.reporting import Reporter
from lorakit.runs.resume import run_key
from lorakit.runs.sole_writer import sole_writer

RESUME_FILE = ".fuse.resume"


def fuse(
    adapter: Adapter,
    model: ModelFolder,
    output: str,
    *,
    dtype: str | None,
    resume: bool,
    reporter: Reporter,
    check: Callable[[Path, str], None] | None,
) -> None:
    """Write the base with the adapter fused into it as a model folder.

    `dtype`, one of FORMATS, is that of all floating-point tensors; None: each as the base has it.
    `check` is called with the finished folder and the format of the fused tensors, and may raise
    LorakitError, which undoes the folder. Raises LorakitError for an adapter that does not fit the
    base, for LoRA on a head whose weights are the embedding's, for a base that cannot be
    dequantised, and for a folder that holds something else.
    """
    folder = Path(output)
    check_fusible(adapter, model)
    weights = plain_weights(model, open_weights(model.folder, model.name))
    plan = _plan(adapter, model, weights, dtype)
    key = run_key(adapter.sha256, sorted(_sizes(weights)), dtype, model.as_base.fingerprint)
    with made_folders(folder, output), sole_writer(str(folder / MODEL_CONFIG)):
        done = _finished_shards(folder, key, resume=resume)
        left = [tensors for file, tensors in plan.items() if file not in done]
        needed = sum(size_of(tensor) for shard in left for tensor in shard.values())
        check_space(folder, needed, folder)
        _mark(folder, key)
        for file in reporter.track(list(plan), "fusing"):
            if file not in done:
                with one_thread():
                    _write_shard(folder / file, plan[file])
        _write_parts(folder, model, weights, plan, adapter, dtype)
        if check is not None:
            try:
                check(folder, _format_of(plan))
            except LorakitError:
                (folder / MODEL_CONFIG).unlink()
                raise
        (folder / RESUME_FILE).unlink()


def check_fusible(adapter: Adapter, model: ModelFolder) -> None:
    """Raise LorakitError where an adapter cannot be fused into a base."""
    check_dequantisable(model)
    check_fits(model.as_base, adapter)
    check_whole_fits(model.as_base, adapter)
    for module in adapter.modules():
        if model.is_head(module.name) and model.ties_head:
            raise LorakitError(
                f"{adapter.name} has LoRA on {module.name}, whose weights {model.name} shares "
                "with its embedding; fusing it would change both: leave that module out"
            )


Plan = Mapping[str, Mapping[str, Tensor | Fused]]  # by file, then by tensor


def _plan(
    adapter: Adapter, model: ModelFolder, weights: Files, dtype: str | None
) -> dict[str, dict[str, Tensor | Fused]]:
    """Return what becomes of each tensor: as it is, in another format, or fused."""
    names = {key for tensors in weights.values() for key in tensors}
    modules = {model.weight_of(m.name, names): m for m in adapter.modules()}
    whole = whole_by_key(adapter, model, names)
    target = None if dtype is None else FORMATS[dtype]

    def planned(key: str, tensor: Weight) -> Tensor | Fused:
        module, form = modules.get(key), target or tensor.dtype
        if isinstance(tensor, Tensor) and tensor.dtype not in FLOATS:
            if module is not None or key in whole:
                raise LorakitError(
                    f"{model.name}: {key} is {tensor.dtype}; give a base in float32, float16 "
                    "or bfloat16"
                )
            return tensor
        tensor = whole.get(key, tensor)
        if isinstance(tensor, Tensor) and module is None and tensor.dtype == form:
            return tensor
        transposed = module is not None and model.stores_transposed(module.name)
        return Fused(key, tensor, form, module, transposed)

    return {
        file: {key: planned(key, tensor) for key, tensor in tensors.items()}
        for file, tensors in weights.items()
    }


def whole_by_key(adapter: Adapter, model: ModelFolder, keys: Collection[str]) -> dict[str, Tensor]:
    """Return the adapter's whole weights by the names that the base's files give them.

    A head whose weights are the embedding's, which the adapter has as well, may have no name.
    """
    return {
        model.stored_name(name, keys): tensor
        for name, tensor in adapter.whole.items()
        if not (model.ties_head and model.is_head(name.rpartition(".")[0]) and name not in keys)
    }


def _format_of(plan: Plan) -> str:
    """Return the number format of the fused tensors, of several the coarsest."""
    formats = {
        tensor.dtype
        for shard in plan.values()
        for tensor in shard.values()
        if isinstance(tensor, Fused) and tensor.module is not None
    }
    return max(formats, key=lambda form: torch.finfo(DTYPES[form]).eps)


def _sizes(weights: Files) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for tensors in weights.values():
        for key, tensor in tensors.items():
            yield key, tensor.dtype, tensor.shape


def _finished_shards(folder: Path, key: str, *, resume: bool) -> set[str]:
    """Return the shards that an earlier run left in a folder and that are gone on from.

    Raises LorakitError for a folder with other files in it.
    """
    marker = folder / RESUME_FILE
    names = {path.name for path in folder.iterdir() if path.name != f".{MODEL_CONFIG}.lock"}
    if names and not marker.exists():
        raise LorakitError(f"{folder} holds files already; give -o a new folder")
    if names and marker.read_text(encoding="utf-8") == key and resume:
        return {name for name in names if name.endswith(".safetensors")}
    if names and marker.read_text(encoding="utf-8") != key:
        raise LorakitError(
            f"{folder} holds part of another model, of a run that was stopped; delete it, or give "
            "-o a new folder"
        )
    return set()


def _mark(folder: Path, key: str) -> None:
    """Mark a folder as one that is being written, by the run of this key."""
    try:
        (folder / RESUME_FILE).write_text(key, encoding="utf-8")
    except OSError as error:
        raise cannot_write(folder, error) from error


def _write_shard(path: Path, tensors: Mapping[str, Tensor | Fused]) -> None:
    with atomic_path(path) as side:
        try:
            with open(side, "wb") as stream:
                write_tensors(tensors, {"format": "pt"}, stream)
        except OSError as error:
            raise LorakitError(
                f"cannot write {path}: {explain(error)}; choose another -o"
            ) from error


def _write_parts(
    folder: Path,
    model: ModelFolder,
    weights: Files,
    plan: Plan,
    adapter: Adapter,
    dtype: str | None,
) -> None:
    """Write all but the weights: what lies beside the base's, the index, the card, the config."""
    for path in _parts(model.folder):
        if path.name not in (MODEL_CONFIG, INDEX):
            with atomic_path(folder / path.name) as side:
                side.write_bytes(path.read_bytes())
    if (model.folder / INDEX).is_file():
        total = sum(size_of(tensor) for shard in plan.values() for tensor in shard.values())
        places = {key: file for file, tensors in weights.items() for key in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        _write_json(folder / INDEX, index)
    with atomic_path(folder / CARD_FILE) as side:
        side.write_text(model_card_text(adapter), encoding="utf-8")
    config = parse_json((model.folder / MODEL_CONFIG).read_text(encoding="utf-8"))
    if isinstance(config, dict):
        config.pop("quantization_config", None)
    if dtype is not None and isinstance(config, dict):
        config = _with_dtype(config, dtype)
    _write_json(folder / MODEL_CONFIG, config)


def _parts(folder: Path) -> list[Path]:
    return sorted({path for pattern in PARTS for path in folder.glob(pattern) if path.is_file()})


def _with_dtype(config: dict[str, object], dtype: str) -> dict[str, object]:
    """Return a config that names the number format, under the key that it did so before."""
    name = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    nested = {
        key: _with_dtype(value, dtype)
        for key, value in config.items()
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value)
    }
    return {**config, **nested, name: dtype}


def _write_json(path: Path, value: object) -> None:
    with atomic_path(path) as side:
        side.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
