"""How vLLM reads a LoRA adapter from a folder, restated for the tests: it needs a GPU to run.

After vLLM's main branch: lora/peft_helper.py (what a config may hold, the scale),
lora/lora_model.py at commit 0306474e9d1f (which tensors and modules), lora/utils.py (their names),
config/lora.py at commit 01230b40128e (the ranks). Some versions read no rank_pattern and
alpha_pattern, others do: an adapter has to mean the same to both.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that its --max-lora-rank can be
LLAMA = frozenset(  # the projections of a Llama, those that vLLM joins taken apart
    {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
)
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # that leave the base as it is
_UNREAD = (
    *("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication"),
    *("use_bdlora", "use_qalora", "trainable_token_indices"),
)


class RefusedByVllmError(Exception):
    """What vLLM would refuse to load."""


def read_adapter(
    folder: Path, *, max_rank: int, expected: frozenset[str] = LLAMA
) -> dict[str, NDArray[np.float64]]:
    """Return ΔW of each module as vLLM's server with this --max-lora-rank would apply it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    _check_config(config, max_rank)
    factors: dict[str, dict[str, NDArray[np.float64]]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, factor = _parsed(key)
        if module.rpartition(".")[2] not in expected:
            raise RefusedByVllmError(f"{module} is none of {sorted(expected)}")
        factors.setdefault(module, {})[factor] = tensor.astype(np.float64)
    return {module: _delta(module, pair, config, max_rank) for module, pair in factors.items()}


def _check_config(config: Mapping[str, Any], max_rank: int) -> None:
    if max_rank not in RANKS:
        raise RefusedByVllmError(f"--max-lora-rank {max_rank} is none of {RANKS}")
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise RefusedByVllmError(f"no {missing}")
    if unread := [key for key in _UNREAD if config.get(key)]:
        raise RefusedByVllmError(f"{unread} are not supported")
    if config.get("bias", "none") != "none":
        raise RefusedByVllmError("biases are not supported")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS:
        raise RefusedByVllmError(f"init_lora_weights={init} is not supported")
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    if min(ranks) <= 0 or max(ranks) > max_rank:
        raise RefusedByVllmError(f"rank {max(ranks)} is beyond {max_rank}")


def _parsed(key: str) -> tuple[str, str]:
    """Return the module and the factor that a tensor's name stands for."""
    match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
    if match is None:
        raise RefusedByVllmError(f"{key} is no LoRA weight")
    return match[1], match[2]


def _delta(
    module: str, pair: Mapping[str, NDArray[np.float64]], config: Mapping[str, Any], max_rank: int
) -> NDArray[np.float64]:
    """Return B·A times the scale, with A and B in buffers of the server's rank."""
    a, b = pair["A"], pair["B"]
    old = _scale(config, config["r"], config["lora_alpha"])
    rank = _matching(config, "rank_pattern", module, config["r"])
    new = _scale(config, rank, _matching(config, "alpha_pattern", module, config["lora_alpha"]))
    if old != new:
        raise RefusedByVllmError(f"{module} is scaled by {old} in one version and {new} in another")
    buffer_a = np.zeros((max_rank, a.shape[1]))
    buffer_b = np.zeros((b.shape[0], max_rank))
    buffer_a[: a.shape[0]], buffer_b[:, : b.shape[1]] = a, b * old
    return buffer_b @ buffer_a


def _scale(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(config: Mapping[str, Any], patterns: str, module: str, default: float) -> Any:
    """Return the value of the first pattern that a module's name ends in, as PEFT matches it."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
