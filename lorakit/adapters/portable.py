"""The encoding of an adapter that PEFT, vLLM and llama.cpp read alike.

vLLM reads r, lora_alpha and use_rslora and no patterns; llama.cpp one alpha over each tensor's own
rank. Alike to all is: one rank everywhere, alpha equal to it, no rslora, no patterns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lorakit.adapters.adapter import Adapter, LoraModule, lora_name
from lorakit.adapters.tensors import FloatArray, Tensor


def make_portable(adapter: Adapter) -> Adapter:
    """Return the adapter with the same ΔW at one rank and scale 1; blocks keep their places.

    Ranks are padded with zeros to the largest and the scale goes into B, which becomes float32
    where its own format cannot hold that exactly.
    """
    rank = max(module.rank for module in adapter.modules())
    tensors: dict[str, Tensor] = {}
    for module in adapter.modules():
        tensors |= _padded(module, rank)
    config = {
        **adapter.config,
        "alpha_pattern": {},
        "lora_alpha": rank,
        "r": rank,
        "rank_pattern": {},
        "use_rslora": False,
    }
    return replace(adapter, tensors=tensors, config=config)


def _padded(module: LoraModule, rank: int) -> dict[str, Tensor]:
    key_a, key_b = lora_name(module.name, "A"), lora_name(module.name, "B")
    more = rank - module.rank
    if more == 0 and module.scale == 1:
        return {key_a: module.tensor_a, key_b: module.tensor_b}
    b = module.b * np.float32(module.scale)
    return {
        key_a: _exact(np.pad(module.a, ((0, more), (0, 0))), module.tensor_a.dtype),
        key_b: _exact(np.pad(b, ((0, 0), (0, more))), module.tensor_b.dtype),
    }


def _exact(values: FloatArray, dtype: str) -> Tensor:
    """Return the values in a format, or in F32 where it cannot hold them exactly."""
    tensor = Tensor.from_array(values, dtype)
    return tensor if np.array_equal(tensor.array(), values) else Tensor.from_array(values)
