"""LoRA on a base model: which projections there are, and adapters put on them.

An adapter is attached as one PEFT adapter whose modules, ranks and scales are the adapter's own, so
that what the model computes is what PEFT computes from the adapter's folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import layer_of
from lorakit.errors import LorakitError
from lorakit.models.base import ADAPTER, FAMILY_TARGETS, Base, Conv1D, put_lora

PeftLayer = Any  # peft.tuners.lora.LoraLayer, whose attributes torch types too widely
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")


def projections(model: Any) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of every projection that LoRA can adapt, by its name in the base.

    Of a model that sees or hears, only those of its text decoder. LoRA that is on the model already
    is looked through.
    """
    inside = _prefix_of_decoder(model)
    found = {}
    for name, module in model.named_modules():
        plain = name.removesuffix(".base_layer")
        if not plain.startswith(inside) or ".lora_" in plain:
            continue
        if isinstance(module, torch.nn.Linear):
            found[plain] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[plain] = (module.weight.shape[1], module.weight.shape[0])
    return found


def _prefix_of_decoder(model: Any) -> str:
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next(str(name) for name, module in model.named_modules() if module is decoder)


def default_targets(base: Base) -> tuple[list[str], str | None]:
    """Return the query and value projections as the family names them, and a note if fused.

    Raises LorakitError for a family that neither names them q_proj and v_proj nor is known to PEFT.
    """
    there = {name.rsplit(".", 1)[-1] for name in projections(base.model)}
    if {"q_proj", "v_proj"} <= there:
        return ["q_proj", "v_proj"], None
    kind = base.model.config.model_type
    known = FAMILY_TARGETS.get(kind, _FUSED)
    fused = [name for name in known if name in there]
    if not fused:
        raise LorakitError(
            f"no default target modules are known for {kind}; give --target-modules, "
            f"of {', '.join(sorted(there))}"
        )
    return fused, f"{kind} has no separate query and value projections: training {', '.join(fused)}"


def pick_modules(base: Base, targets: Sequence[str], layers: Sequence[int] | None) -> list[str]:
    """Return the names of the projections that end in one of `targets`, in the layers given.

    `all-linear` is every projection inside a decoder layer. Raises LorakitError for a target or a
    layer that the model does not have.
    """
    inside = [name for name in projections(base.model) if layer_of(name) is not None]
    if list(targets) == ["all-linear"]:
        chosen = inside
    else:
        for target in targets:
            if not any(_ends_in(name, target) for name in inside):
                there = sorted({name.rsplit(".", 1)[-1] for name in inside})
                raise LorakitError(
                    f"{base.name} has no module {target}; choose --target-modules from "
                    f"{', '.join(there)}"
                )
        chosen = [name for name in inside if any(_ends_in(name, target) for target in targets)]
    if layers is None:
        return chosen
    beyond = [layer for layer in layers if layer >= base.layers]
    if beyond:
        raise LorakitError(
            f"{base.name} has no layer {beyond[0]}; give --layers within 0-{base.layers - 1}"
        )
    within = [name for name in chosen if layer_of(name) in layers]
    if not within:
        raise LorakitError(f"no layer of --layers has {', '.join(targets)}; choose other layers")
    return within


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def is_transposed(base: Base, modules: Sequence[str]) -> bool:
    """Whether the weights of these modules lie (d_in, d_out), PEFT's `fan_in_fan_out`."""
    module = base.model.get_submodule(modules[0])
    plain = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return isinstance(plain, Conv1D)


def inject(
    base: Base, ranks: Mapping[str, int], *, alpha: float | None = None, dropout: float = 0.0
) -> dict[str, PeftLayer]:
    """Put a fresh LoRA of the given rank on each module named; return PEFT's layers by name.

    The scale is alpha/rank, or 1 where no alpha is given. Weights are float32, A as PEFT
    initialises it, B zero; they alone are trainable. The base changes in place: LoRA that was on it
    is taken off first.
    """
    _take_off(base.model)
    rank = max(ranks.values())
    other = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    put_lora(
        base.model,
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern=dict(other) if alpha is None else {},
        fan_in_fan_out=is_transposed(base, list(ranks)),
    )
    layers: dict[str, PeftLayer] = {name: base.model.get_submodule(name) for name in ranks}
    for layer in layers.values():
        for factors in (layer.lora_A, layer.lora_B):
            factors[ADAPTER].to(torch.float32)
    base.model.eval()
    return layers


def _take_off(model: Any) -> None:
    """Put the base's own projections back where PEFT's layers stand."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def attach(base: Base, adapter: Adapter) -> dict[str, PeftLayer]:
    """Put an adapter on its base: the model then computes W0·x + s·B·A·x; return PEFT's layers.

    Raises LorakitError naming the module and both shapes where the adapter does not fit.
    """
    modules = adapter.modules()
    check_fits(base, adapter)
    layers = inject(base, {module.name: module.rank for module in modules})
    for module in modules:
        layer = layers[module.name]
        set_factors(layer, module.a, module.b)
        layer.scaling[ADAPTER] = module.scale
    return layers


def set_factors(layer: PeftLayer, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    """Copy A (rank, d_in) and B (d_out, rank) into a PEFT layer."""
    with torch.no_grad():
        layer.lora_A[ADAPTER].weight.copy_(torch.tensor(a))
        layer.lora_B[ADAPTER].weight.copy_(torch.tensor(b))


def factors(layer: PeftLayer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Return the A (rank, d_in) and B (d_out, rank) of a PEFT layer."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def set_rank_scales(layer: PeftLayer, scales: torch.Tensor) -> None:
    """Multiply A·x by a scale for each rank, float32 (rank,), in a hook on PEFT's lora_A."""
    a = layer.lora_A[ADAPTER]
    a.register_buffer("rank_scales", scales, persistent=False)
    a.register_forward_hook(lambda module, inputs, output: output * module.rank_scales)


def rank_scales(layer: PeftLayer) -> torch.Tensor:
    """Return what multiplies each rank of a PEFT layer, its scaling included: (rank,) or ()."""
    weight = layer.lora_A[ADAPTER].weight
    whole = weight.new_tensor(layer.scaling[ADAPTER])
    own = getattr(layer.lora_A[ADAPTER], "rank_scales", None)
    scales: torch.Tensor = whole if own is None else own * whole
    return scales


def check_fits(base: Base, adapter: Adapter) -> None:
    """Raise LorakitError naming the first module the base lacks or has in another shape."""
    there = projections(base.model)
    for module in adapter.modules():
        if module.name not in there:
            raise LorakitError(
                f"{adapter.name}: {base.name} has no module {module.name}; "
                "give the base the adapter was trained on by --model"
            )
        shape = module.shape
        if shape != there[module.name]:
            raise LorakitError(
                f"{adapter.name}: {module.name} is {_by(shape)}, in {base.name} it is "
                f"{_by(there[module.name])}; give the base the adapter was trained on by --model"
            )


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"
