"""An adapter fused into its base: W0 + ΔW, shard by shard, in a folder that loads as a model.

One tensor is in memory at a time, beside the adapter: shards are mapped, and each tensor goes to
its file as it is computed. ΔW = s·B·A is added in float32 and rounded once. A stopped run leaves
whole shards, with which --resume goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.adapters.adapter import Adapter, LoraModule
from lorakit.adapters.card import CARD_FILE, model_card_text
from lorakit.adapters.safetensors import write_tensors
from lorakit.adapters.tensors import FLOATS, ITEM_SIZES, Tensor
from lorakit.errors import LorakitError
from lorakit.export.model_folder import PARTS, ModelFolder
from lorakit.export.weight_files import INDEX, WeightFiles, open_weights
from lorakit.files import atomic_path, cannot_write, check_space, explain, made_folders
from lorakit.foreign_text import parse_json
from lorakit.models.lora import check_fits
from lorakit.reporting import Reporter
from lorakit.runs.resume import run_key
from lorakit.runs.sole_writer import sole_writer

CONFIG_FILE = "config.json"
RESUME_FILE = ".fuse.resume"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FORMATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCK = 1 << 23  # parameters of a weight that are computed at a time


@dataclass(frozen=True)
class Fused:
    """A tensor that is computed as it is written: a weight plus what a LoRA module changes of it.

    Without a module it is the weight in another number format.
    """

    key: str
    weight: Tensor
    dtype: str
    module: LoraModule | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def pieces(self) -> Iterator[memoryview]:
        """Yield the bytes in runs of rows; LorakitError where the format cannot hold a value."""
        rows = self.weight.array().reshape(self.shape[0] if self.shape else 1, -1)
        change = self._change()
        count = max(1, _BLOCK // max(1, rows.shape[1]))
        for first in range(0, len(rows), count):
            values = torch.from_numpy(rows[first : first + count].copy())
            if change is not None:
                values += change(slice(first, first + count))
            stored = values.to(DTYPES[self.dtype])
            if not bool(torch.isfinite(stored).all()) and bool(torch.isfinite(values).all()):
                raise LorakitError(f"{self.key} is beyond {self.dtype}; give --dtype float32")
            yield memoryview(stored.contiguous().view(torch.uint8).numpy().tobytes())
        self.weight.release()

    def _change(self) -> Callable[[slice], torch.Tensor] | None:
        """Return the function that computes some rows of ΔW as the weight is stored."""
        if self.module is None:
            return None
        a, b = (torch.from_numpy(factor.copy()) for factor in (self.module.a, self.module.b))
        scale = self.module.scale
        if self.transposed:
            return lambda rows: (a[:, rows].T @ b.T) * scale
        return lambda rows: (b[rows] @ a) * scale


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
    base, for LoRA on a head whose weights are the embedding's, for a quantised base, and for a
    folder that holds something else.
    """
    folder = Path(output)
    check_fusible(adapter, model)
    weights = open_weights(model.folder, model.name)
    plan = _plan(adapter, model, weights, dtype)
    key = run_key(adapter.sha256, sorted(_sizes(weights)), dtype, model.as_base.fingerprint)
    with made_folders(folder, output), sole_writer(str(folder / CONFIG_FILE)):
        done = _begin(folder, key, resume=resume)
        left = [tensors for file, tensors in plan.items() if file not in done]
        needed = sum(size_of(tensor) for shard in left for tensor in shard.values())
        check_space(folder, needed, folder)
        for file in reporter.track(list(plan), "fusing"):
            if file not in done:
                _write_shard(folder / file, plan[file])
        _write_parts(folder, model, weights, plan, adapter, dtype)
        if check is not None:
            try:
                check(folder, _format_of(plan))
            except LorakitError:
                (folder / CONFIG_FILE).unlink()
                raise
        (folder / RESUME_FILE).unlink()


def check_fusible(adapter: Adapter, model: ModelFolder) -> None:
    """Raise LorakitError where an adapter cannot be fused into a base."""
    if (method := model.quantisation) is not None:
        raise LorakitError(
            f"{model.name} is quantised ({method}), and nothing can be added to its weights; "
            "give the model it was made from by --model"
        )
    check_fits(model.as_base, adapter)
    for module in adapter.modules():
        if model.is_head(module.name) and model.ties_head:
            raise LorakitError(
                f"{adapter.name} has LoRA on {module.name}, whose weights {model.name} shares "
                "with its embedding; fusing it would change both: leave that module out"
            )


Plan = Mapping[str, Mapping[str, Tensor | Fused]]  # by file, then by tensor


def _plan(
    adapter: Adapter, model: ModelFolder, weights: WeightFiles, dtype: str | None
) -> dict[str, dict[str, Tensor | Fused]]:
    """Return what becomes of each tensor: as it is, in another format, or fused."""
    stored = weights.tensors
    modules = {model.weight_of(m.name, stored.keys()): m for m in adapter.modules()}
    target = None if dtype is None else FORMATS[dtype]

    def planned(key: str, tensor: Tensor) -> Tensor | Fused:
        module = modules.get(key)
        if tensor.dtype not in FLOATS:
            if module is not None:
                raise LorakitError(
                    f"{model.name}: {key} is {tensor.dtype}; give a base in float32, float16 "
                    "or bfloat16"
                )
            return tensor
        if module is None and target in (None, tensor.dtype):
            return tensor
        transposed = module is not None and model.stores_transposed(module.name)
        return Fused(key, tensor, target or tensor.dtype, module, transposed)

    return {
        file: {key: planned(key, tensor) for key, tensor in tensors.items()}
        for file, tensors in weights.files.items()
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


def _sizes(weights: WeightFiles) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for key, tensor in weights.tensors.items():
        yield key, tensor.dtype, tensor.shape


def _begin(folder: Path, key: str, *, resume: bool) -> set[str]:
    """Mark a folder as one that is being written; return the shards that an earlier run left.

    Raises LorakitError for a folder with other files in it.
    """
    marker = folder / RESUME_FILE
    names = {path.name for path in folder.iterdir() if path.name != f".{CONFIG_FILE}.lock"}
    if names and not marker.exists():
        raise LorakitError(f"{folder} holds files already; give -o a new folder")
    if names and marker.read_text(encoding="utf-8") == key and resume:
        return {name for name in names if name.endswith(".safetensors")}
    if names and marker.read_text(encoding="utf-8") != key:
        raise LorakitError(
            f"{folder} holds part of another model, of a run that was stopped; delete it, or give "
            "-o a new folder"
        )
    try:
        marker.write_text(key, encoding="utf-8")
    except OSError as error:
        raise cannot_write(folder, error) from error
    return set()


def size_of(tensor: Tensor | Fused) -> int:
    """Return how many bytes a tensor takes in a file."""
    return math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype]


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
    weights: WeightFiles,
    plan: Plan,
    adapter: Adapter,
    dtype: str | None,
) -> None:
    """Write all but the weights: what lies beside the base's, the index, the card, the config."""
    for path in _parts(model.folder):
        if path.name not in (CONFIG_FILE, INDEX):
            with atomic_path(folder / path.name) as side:
                side.write_bytes(path.read_bytes())
    if (model.folder / INDEX).is_file():
        total = sum(size_of(tensor) for shard in plan.values() for tensor in shard.values())
        places = {key: file for file, tensors in weights.files.items() for key in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        _write_json(folder / INDEX, index)
    with atomic_path(folder / CARD_FILE) as side:
        side.write_text(model_card_text(adapter), encoding="utf-8")
    config = parse_json((model.folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if dtype is not None and isinstance(config, dict):
        config = _with_dtype(config, dtype)
    _write_json(folder / CONFIG_FILE, config)


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
