"""Rewrite an adapter so that PEFT, vLLM and llama.cpp all read it in the same way.

vLLM reads r, lora_alpha and use_rslora but no patterns; llama.cpp divides a single alpha by each
tensor's own rank. They agree on an adapter with one rank, alpha equal to it, no rslora and no
patterns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lorakit.adapters.adapter import Adapter, LoraModule
from lorakit.adapters.names import lora_name
from lorakit.adapters.tensors import Tensor
from lorakit.adapters.whole import check_plain


def make_portable(adapter: Adapter) -> Adapter:
    """Return the adapter with the same ΔW at one rank and scale 1; blocks stay where they are.

    Ranks are padded with zeros to the largest, and the scale is folded into B, which becomes
    float32 if its own format cannot hold the product exactly. Raises LorakitError for an adapter
    that holds more than A and B.
    """
    check_plain(adapter, "vLLM or llama.cpp")
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
    """Return the module's A and B, padded to `rank` and with its scale in B, by PEFT's names."""
    key_a, key_b = lora_name(module.name, "A"), lora_name(module.name, "B")
    missing = rank - module.rank
    if missing == 0 and module.scale == 1:
        return {key_a: module.tensor_a, key_b: module.tensor_b}
    b = module.b * np.float32(module.scale)
    return {
        key_a: Tensor.exactly(np.pad(module.a, ((0, missing), (0, 0))), module.tensor_a.dtype),
        key_b: Tensor.exactly(np.pad(b, ((0, 0), (0, missing))), module.tensor_b.dtype),
    }
