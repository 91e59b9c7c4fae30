"""Bases whose weights take 4 or 8 bits: `--load-in`, and models that were quantised before.

The arithmetic is bitsandbytes': NF4 with its scales quantised again (Dettmers et al., 2023), and
LLM.int8 (Dettmers et al., 2022). LoRA weights, embeddings, norms and the output head stay as wide
as they are without it. How LoRA is put on such layers is up to PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from lorakit.errors import LorakitError, check_packages
from lorakit.models.architecture import Model, ModelConfig

BITSANDBYTES = "bitsandbytes"
_DEVICES = ("cpu", "cuda", "xpu")  # on which lorakit asks it to compute


def quantising(load_in: str | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments with which transformers quantises weights as it loads them.

    They are none for None. 4-bit weights are multiplied in `dtype`. Raises LorakitError where
    bitsandbytes is missing, or cannot compute on the device.
    """
    if load_in is None:
        return {}
    check_packages(f"--load-in {load_in}", BITSANDBYTES, extra="quant")
    if device.type not in _DEVICES:
        raise LorakitError(
            f"--load-in {load_in} cannot compute on {device.type}; give --device cpu, or leave "
            "--load-in out"
        )
    if load_in == "8bit":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config}


def check_quantised(config: ModelConfig, name: str, load_in: str | None, *, shard: bool) -> None:
    """Raise LorakitError for a model that was quantised before, where it cannot be loaded as asked.

    It cannot be quantised again or sharded, and bitsandbytes has to be there if it was used.
    """
    method = quantisation_of(config)
    if method is None:
        return
    if load_in is not None or shard:
        option = "--load-in" if load_in is not None else "--shard"
        raise LorakitError(
            f"the weights of {name} are quantised already ({method}); leave {option} out"
        )
    if method == BITSANDBYTES:
        check_packages(f"the model {name}", BITSANDBYTES, extra="quant")


def quantisation_of(config: ModelConfig) -> str | None:
    """Return the method by which a model's weights were quantised, None if they were not."""
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        return None
    method = fields.get("quant_method") if isinstance(fields, Mapping) else fields.quant_method
    text = str(getattr(method, "value", method) or BITSANDBYTES)  # old configs name none
    return BITSANDBYTES if text.startswith(BITSANDBYTES) else text


def dequantise(model: Model, dtype: torch.dtype) -> Model:
    """Return a model with plain layers in place of bitsandbytes'; another one as it is."""
    if quantisation_of(model.config) != BITSANDBYTES:
        return model
    return model.dequantize().to(dtype)


def keep_gradients(model: Model) -> None:
    """Have 4-bit layers keep the layout of their weights on a CPU with bfloat16 instructions.

    Without gradients bitsandbytes there changes the layout, for speed, to one that it multiplies
    without a backward pass: a model that had been validated once would train on wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
