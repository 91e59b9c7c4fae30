"""A whole model as one GGUF file, with an adapter fused into it or as it is.

Each weight is read from the model's mapped files, summed with its ΔW in float32, put in llama.cpp's
order and rounded once to the file's format; one is in memory at a time, beside the adapter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from lorakit.adapters.adapter import Adapter, LoraModule
from lorakit.adapters.tensors import FLOATS, FloatArray
from lorakit.errors import LorakitError
from lorakit.export.dequantised import Weight, check_dequantisable, plain_weights
from lorakit.export.fuse import check_fusible, whole_by_key
from lorakit.export.fused import Fused
from lorakit.export.model_folder import ModelFolder
from lorakit.export.weight_files import open_weights
from lorakit.gguf.base import base_name_fields, header_fields, licence_of
from lorakit.gguf.file import BLOCK, GgufTensor, Value, write_gguf
from lorakit.gguf.hyperparameters import context_of, frequency_factors, hyperparameters
from lorakit.gguf.names import GgufNames, names_of
from lorakit.gguf.tokenizer import tokenizer_fields
from lorakit.models.loading import load_encoder
from lorakit.reporting import Reporter
from lorakit.settings import GenerationSettings

# By the names of --dtype: the format of the tensors, and gguf's LlamaFileType.
FORMATS = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}


def fuse_gguf(
    adapter: Adapter | None,
    model: ModelFolder,
    output: str,
    *,
    dtype: str | None,
    trust_remote_code: bool,
    reporter: Reporter,
) -> None:
    """Write a model, with an adapter fused into it if there is one, as a GGUF file.

    `dtype`, one of FORMATS, is that of the matrices; None: each as the base has it. Vectors are
    float32, and so are positions, as llama.cpp wants them; rows that Q8_0 cannot cut into blocks
    are float16. Raises LorakitError as `fuse` does, and for what
    llama.cpp does not compute as transformers does.
    """
    names = names_of(model.model.config.to_dict(), model.name)
    encoder = load_encoder(
        model.name,
        GenerationSettings(),
        revision=model.revision,
        trust_remote_code=trust_remote_code,
    )
    if adapter is not None:
        check_fusible(adapter, model)
    check_dequantisable(model)
    fields = {
        **_general(adapter, model, dtype),
        **hyperparameters(names),
        **tokenizer_fields(encoder, size=int(names.config["vocab_size"]), name=model.name),
    }
    if remark := context_of(names)[1]:
        reporter.note(remark)
    tensors = [*_tensors(adapter, model, names, dtype), *_factors(names)]
    write_gguf(output, names.architecture, fields, tensors, reporter=reporter)


def _general(adapter: Adapter | None, model: ModelFolder, dtype: str | None) -> dict[str, Value]:
    """Return the fields about the file: what it is, of whom, and how it was made."""
    import gguf

    base = base_name_fields(model.name)
    title = str(base["general.base_model.0.name"])
    fields: dict[str, Value] = {
        "general.type": "model",
        "general.name": title if adapter is None else f"{title} with a LoRA adapter",
        "general.license": licence_of(model.folder),
        **base,
        "general.tags": ["lorakit"] if adapter is None else ["lora", "lorakit"],
        **header_fields(adapter),
    }
    if dtype is not None:
        fields["general.file_type"] = int(gguf.LlamaFileType[FORMATS[dtype][1]])
    if dtype == "q8_0":
        fields["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    return fields


def _tensors(
    adapter: Adapter | None, model: ModelFolder, names: GgufNames, dtype: str | None
) -> Iterator[GgufTensor]:
    """Yield every parameter of the model as llama.cpp has it, in the order of its modules."""
    files = plain_weights(model, open_weights(model.folder, model.name))
    stored = {key: weight for weights in files.values() for key, weight in weights.items()}
    if adapter is not None:
        stored |= whole_by_key(adapter, model, stored)
    modules = {module.name: module for module in adapter.modules()} if adapter else {}
    for parameter, _ in model.model.named_parameters():
        key = model.stored_name(parameter, stored.keys())
        yield _tensor(parameter, key, stored[key], modules, model, names, dtype)


def _tensor(
    parameter: str,
    key: str,
    weight: Weight,
    modules: Mapping[str, LoraModule],
    model: ModelFolder,
    names: GgufNames,
    dtype: str | None,
) -> GgufTensor:
    """Return a parameter as it goes to the file; `key` is its name in the model's own files."""
    if weight.dtype not in FLOATS:
        raise LorakitError(
            f"{model.name}: {key} is {weight.dtype}; give a base in float32, float16 or bfloat16"
        )
    name, owner = names.tensor(parameter), parameter.rpartition(".")[0]
    transposed = len(weight.shape) == 2 and model.stores_transposed(owner)
    module = modules.get(owner) if parameter.endswith(".weight") else None
    fused = Fused(key, weight, "F32", module, transposed)
    offset = names.family.norm_offset if parameter.endswith("norm.weight") else 0.0

    def values() -> FloatArray:
        rows = _computed(fused)
        return names.in_order(parameter, rows.T if transposed else rows) + np.float32(offset)

    shape = weight.shape[::-1] if transposed else weight.shape
    return GgufTensor(name, shape, _format(name, shape, weight, dtype), values)


def _computed(fused: Fused) -> FloatArray:
    """Return a fused weight as one array."""
    values = np.empty(math.prod(fused.shape), np.float32)
    first = 0
    for piece in fused.pieces():
        run = np.frombuffer(piece, np.float32)
        values[first : first + len(run)] = run
        first += len(run)
    return values.reshape(fused.shape)


def _format(name: str, shape: tuple[int, ...], weight: Weight, dtype: str | None) -> str:
    """Return the number format of a tensor in the file."""
    if len(shape) == 1 or name.startswith("position_embd"):
        return "F32"
    target = weight.dtype if dtype is None else FORMATS[dtype][0]
    return "F16" if target == "Q8_0" and shape[-1] % BLOCK else target


def _factors(names: GgufNames) -> Iterator[GgufTensor]:
    for name, values in frequency_factors(names).items():
        yield GgufTensor(name, values.shape, "F32", functools.partial(np.asarray, values))
