"""Adapters whose initialisation changed the base (PiSSA and its kin), as plain LoRA.

PiSSA, OLoRA, CorDA and LoRA-GA take B0·A0 out of the weights before they train: W0 - s·B0·A0 +
s·B·A is what the adapter stands for, so that on the unchanged base ΔW = s·(B·A - B0·A0). That is
what PEFT's `path_initial_model_for_weight_conversion` writes, at twice the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lorakit.adapters.adapter import Adapter, LoraModule
from lorakit.adapters.blocks import plain_name
from lorakit.adapters.config import DEFAULT_ALPHA, DEFAULT_RANK, Config
from lorakit.adapters.config_keys import SUBTRACTED_INITS
from lorakit.adapters.history import new_entry, with_entry
from lorakit.adapters.names import lora_name
from lorakit.adapters.tensors import Tensor
from lorakit.adapters.whole import check_plain
from lorakit.errors import LorakitError
from lorakit.foreign_text import quote
from lorakit.versions import version_of


def subtract_initial(adapter: Adapter, initial: Adapter) -> Adapter:
    """Return plain LoRA, at twice the rank, whose ΔW on the unchanged base is the adapter's.

    `initial` is the adapter as it was before it was trained. Tensors keep their number formats.
    Raises LorakitError for an adapter whose initialisation is not in SUBTRACTED_INITS, for one that
    equals its initial one, and naming the module where the two differ in rank, scale or shape.
    """
    check_plain(adapter, "the conversion")
    _check_init(adapter, initial)
    before = {module.name: module for module in initial.modules()}
    tensors: dict[str, Tensor] = {}
    for module in adapter.modules():
        _check_same(module, before.get(module.name), adapter, initial)
        tensors |= _stacked(module, before[module.name])
    entry = new_entry(
        "convert",
        versions={package: version_of(package) for package in ("lorakit", "numpy")},
        settings={"initial_adapter": initial.sha256},
        parents={plain_name(adapter.name): adapter.sha256},
    )
    return replace(
        adapter,
        tensors=tensors,
        config=_doubled(adapter.config),
        header=with_entry(adapter.header, entry),
    )


def _check_init(adapter: Adapter, initial: Adapter) -> None:
    """Raise LorakitError for an adapter that took nothing out of its base, or got nothing since."""
    init = str(adapter.config.get("init_lora_weights")).lower()
    if not init.startswith(SUBTRACTED_INITS):
        raise LorakitError(
            f"{adapter.name}: init_lora_weights {quote(init)} took nothing out of the base that an "
            "initial adapter tells; leave --initial-adapter out"
        )
    if initial.sha256 == adapter.sha256:
        raise LorakitError(
            f"{initial.name} holds the same as {adapter.name}, so that nothing would be left; give "
            "the adapter as it was before training"
        )


def _check_same(
    module: LoraModule, before: LoraModule | None, adapter: Adapter, initial: Adapter
) -> None:
    shapes = None if before is None else (before.rank, before.shape, before.scale)
    if shapes != (module.rank, module.shape, module.scale):
        raise LorakitError(
            f"{initial.name}: {quote(module.name)} has another rank, shape or scale than in "
            f"{adapter.name}, or no LoRA; give the adapter as it was before training"
        )


def _stacked(module: LoraModule, before: LoraModule) -> dict[str, Tensor]:
    """Return A = [A; A0] and B = [B, -B0] by PEFT's names, exactly."""
    a = np.concatenate([module.a, before.a], axis=0)
    b = np.concatenate([module.b, -before.b], axis=1)
    return {
        lora_name(module.name, "A"): Tensor.exactly(a, module.tensor_a.dtype),
        lora_name(module.name, "B"): Tensor.exactly(b, module.tensor_b.dtype),
    }


def _doubled(config: Config) -> dict[str, object]:
    """Return the config of twice the rank at the same scale, with a harmless initialisation."""
    growth = math.sqrt(2) if config.get("use_rslora") else 2
    ranks: Mapping[str, int] = config.get("rank_pattern") or {}
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    return {
        **config,
        "alpha_pattern": {pattern: alpha * growth for pattern, alpha in alphas.items()},
        "init_lora_weights": True,
        "lora_alpha": config.get("lora_alpha", DEFAULT_ALPHA) * growth,
        "r": config.get("r", DEFAULT_RANK) * 2,
        "rank_pattern": {pattern: rank * 2 for pattern, rank in ranks.items()},
    }
