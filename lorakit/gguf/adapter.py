"""Adapters in llama.cpp's own form: one GGUF file, for `llama-server --lora` and Ollama's ADAPTER.

llama.cpp adds alpha/rank·B·A, with one alpha for the file and the rank of each pair. A and B have
PEFT's shapes (Conv1D's too: a pair does not tell how its weight is stored), and B's rows are in the
order of the weight's. Only the base's config is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lorakit.adapters.adapter import Adapter, LoraModule
from lorakit.adapters.base_model import base_revision, choose_model
from lorakit.adapters.portable import make_portable
from lorakit.adapters.tensors import FloatArray, Tensor
from lorakit.errors import LorakitError
from lorakit.gguf.base import base_name_fields, header_fields, read_config
from lorakit.gguf.file import GgufTensor, Value, write_gguf
from lorakit.gguf.names import HEAD, Config, GgufNames, names_of, width_of
from lorakit.settings import ModelSettings


def convert_to_gguf(
    adapter: Adapter, output: str, model: ModelSettings, note: Callable[[str], None]
) -> None:
    """Write an adapter as GGUF for the base that `model`, or the adapter, names.

    A note tells which base was taken, where none was named. Raises LorakitError as
    `save_gguf_adapter` does, and for a base whose config cannot be had.
    """
    name, remark = choose_model(model.model, [adapter])
    if remark:
        note(remark)
    config = read_config(name, model.revision or base_revision([adapter], name))
    save_gguf_adapter(adapter, output, config=config, base=name)


def save_gguf_adapter(adapter: Adapter, output: str, *, config: Config, base: str) -> None:
    """Write an adapter of the model `base`, which has this config, as a GGUF file.

    Where alpha differs between modules, all get the largest rank, padded with zeros, and scale 1.
    float16 stays; bfloat16 becomes float32, which holds it exactly, since not every device of
    llama.cpp multiplies it. Raises LorakitError for modules that llama.cpp does not have, and
    for a base of another family.
    """
    names = names_of(config, base)
    if len(set(map(_alpha, adapter.modules()))) > 1:
        adapter = make_portable(adapter)
    fields: dict[str, Value] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": _alpha(adapter.modules()[0]),
        "general.name": f"LoRA adapter of {base_name_fields(base)['general.base_model.0.name']}",
        **base_name_fields(base),
        "general.tags": ["lora", "lorakit"],
        **header_fields(adapter),
    }
    write_gguf(output, names.architecture, fields, list(_tensors(adapter, names)))


def _alpha(module: LoraModule) -> float:
    """Return the alpha, alpha/rank being the scale, that llama.cpp has to read for a module."""
    return float(np.float32(module.scale * module.rank))


def _tensors(adapter: Adapter, names: GgufNames) -> Iterator[GgufTensor]:
    for module in adapter.modules():
        weight = f"{module.name}.weight"
        name = names.tensor(weight)
        if names.ties_head and name == HEAD:
            raise LorakitError(
                f"{adapter.name} has LoRA on {module.name}, whose weights {names.name} shares with "
                "its embedding, and llama.cpp has no such tensor; leave that module out"
            )
        _check_width(module, adapter, names)
        names.in_order(weight, module.b)  # raises an error before the file is begun
        yield _tensor(f"{name}.lora_a", module.tensor_a)
        yield _tensor(f"{name}.lora_b", module.tensor_b, names, weight)


def _check_width(module: LoraModule, adapter: Adapter, names: GgufNames) -> None:
    """Raise LorakitError for a module that neither reads nor writes values of the base's width."""
    width = width_of(names.config)
    if width not in module.shape:
        rows, columns = module.shape
        raise LorakitError(
            f"{adapter.name}: {module.name} is {rows}×{columns}, and {names.name} is {width} wide; "
            "give the base the adapter was trained on by --model"
        )


def _tensor(
    name: str, tensor: Tensor, names: GgufNames | None = None, weight: str = ""
) -> GgufTensor:
    """Return a factor, its rows in the order of `weight`'s where `names` is given."""

    def values() -> FloatArray:
        rows = tensor.array()
        return rows if names is None else names.in_order(weight, rows)

    return GgufTensor(name, tensor.shape, "F16" if tensor.dtype == "F16" else "F32", values)
