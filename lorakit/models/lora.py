"""LoRA on a base model: find its projections and put adapters on them, by peft.

No other module imports peft, which takes seconds: this one does where it needs it. An adapter is
attached as one PEFT adapter with its own modules, ranks and scales, so that the model computes what
PEFT computes from the adapter's folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import last_part, layer_of
from lorakit.adapters.tensors import Tensor
from lorakit.adapters.whole import check_plain
from lorakit.errors import LorakitError
from lorakit.models.architecture import Model, decoder_prefix
from lorakit.models.base import Base
from lorakit.models.libraries import BITSANDBYTES, hidden

ADAPTER = "default"  # PEFT's name for the one adapter that is on a base
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")


class PeftLayer(Protocol):
    """A projection with LoRA on it: what lorakit uses of peft.tuners.lora.LoraLayer.

    The dictionaries are by adapter name; the weights are (rank, d_in) in lora_A and (d_out, rank)
    in lora_B.
    """

    lora_A: Mapping[str, torch.nn.Linear]  # noqa: N815  PEFT's name
    lora_B: Mapping[str, torch.nn.Linear]  # noqa: N815
    lora_dropout: torch.nn.ModuleDict
    lora_magnitude_vector: Mapping[str, torch.nn.Module]
    scaling: dict[str, float]
    forward: Callable[..., torch.Tensor]

    def get_base_layer(self) -> torch.nn.Module: ...


def projections(model: Model) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of every projection that LoRA can adapt, by its name in the base.

    For a multimodal model, only those of its text decoder. The names are those of the bare base,
    whether LoRA is on it or not.
    """
    prefix = decoder_prefix(model)
    shapes = {}
    for name, module in model.named_modules():
        plain = name.removesuffix(".base_layer")
        if not plain.startswith(prefix) or ".lora_" in plain:
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[plain] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[plain] = (module.weight.shape[1], module.weight.shape[0])
    return shapes


def default_targets(base: Base) -> tuple[list[str], str | None]:
    """Return the family's names of the query and value projections, and a note if fused.

    Raises LorakitError for a family that neither names them q_proj and v_proj nor is known to PEFT.
    """
    endings = {last_part(name) for name in projections(base.model)}
    if {"q_proj", "v_proj"} <= endings:
        return ["q_proj", "v_proj"], None
    family = base.model.config.model_type
    fused = [name for name in _family_targets().get(family, _FUSED) if name in endings]
    if not fused:
        raise LorakitError(
            f"no default target modules are known for {family}; give --target-modules, "
            f"of {', '.join(sorted(endings))}"
        )
    note = f"{family} has no separate query and value projections: training {', '.join(fused)}"
    return fused, note


def _family_targets() -> Mapping[str, Sequence[str]]:
    """Return PEFT's projections to adapt by family."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    table: Mapping[str, Sequence[str]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return table


def pick_modules(base: Base, targets: Sequence[str], layers: Sequence[int] | None) -> list[str]:
    """Return the names of the projections in `layers` (None: all) that end in one of `targets`.

    `all-linear` is every projection inside a decoder layer; where no name tells of layers, every
    one but the output head. Raises LorakitError for a target or a layer that the model does not
    have.
    """
    inside = _projections_inside(base.model)
    if list(targets) == ["all-linear"]:
        chosen = inside
    else:
        for target in targets:
            if not any(_ends_in(name, target) for name in inside):
                endings = sorted({last_part(name) for name in inside})
                raise LorakitError(
                    f"{base.name} has no module {target}; choose --target-modules from "
                    f"{', '.join(endings)}"
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


def _projections_inside(model: Model) -> list[str]:
    """Return the names of the projections inside decoder layers, or of all but the output head."""
    names = list(projections(model))
    head = model.get_output_embeddings()
    within = [name for name in names if layer_of(name) is not None]
    return within or [name for name in names if model.get_submodule(name) is not head]


def _ends_in(name: str, target: str) -> bool:
    """Return whether the last parts of a module's name are `target`."""
    return name == target or name.endswith(f".{target}")


def is_transposed(base: Base, modules: Sequence[str]) -> bool:
    """Return whether these modules' weights are (d_in, d_out), PEFT's `fan_in_fan_out`."""
    module = base.model.get_submodule(modules[0])
    plain = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return isinstance(plain, Conv1D)


def inject(
    base: Base,
    ranks: Mapping[str, int],
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    dora: bool = False,
) -> dict[str, PeftLayer]:
    """Put a fresh LoRA on each module in `ranks`, of that rank; return PEFT's layers by name.

    The scale is alpha/rank, or 1 without an alpha. A and B are float32, A as PEFT initialises it, B
    zero; they alone are trainable. The base is changed in place: any LoRA on it is removed first.
    """
    import peft

    _remove_lora_(base.model)
    rank = max(ranks.values())
    other = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # PEFT only divides
        lora_dropout=dropout,
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern=dict(other) if alpha is None else {},
        fan_in_fan_out=is_transposed(base, list(ranks)),
        use_dora=dora,
    )
    with hidden(BITSANDBYTES):  # which a base that needs it has imported
        peft.inject_adapter_in_model(config, base.model, adapter_name=ADAPTER)
    layers: dict[str, PeftLayer] = {name: base.model.get_submodule(name) for name in ranks}
    for layer in layers.values():
        for factors in (layer.lora_A, layer.lora_B):
            factors[ADAPTER].to(torch.float32)
    base.model.eval()
    return layers


def _remove_lora_(model: Model) -> None:
    """Replace PEFT's layers by the base's own projections."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def attach(base: Base, adapter: Adapter) -> dict[str, PeftLayer]:
    """Put an adapter on its base, which then computes W0·x + s·B·A·x; return PEFT's layers.

    Raises LorakitError naming the module and both shapes if the adapter does not fit, and for one
    that holds more than A and B, which whole.py puts on.
    """
    check_plain(adapter)
    return attach_lora(base, adapter)


def attach_lora(base: Base, adapter: Adapter) -> dict[str, PeftLayer]:
    """Put an adapter's A and B on its base, with DoRA's magnitudes; return PEFT's layers.

    Raises LorakitError naming the module and both shapes if the adapter does not fit.
    """
    modules = adapter.modules()
    check_fits(base, adapter)
    ranks = {module.name: module.rank for module in modules}
    layers = inject(base, ranks, dora=adapter.is_dora)
    for module in modules:
        layer = layers[module.name]
        set_factors(layer, module.a, module.b)
        layer.scaling[ADAPTER] = module.scale
        if module.magnitude is not None:
            _set_magnitude(layer, module.magnitude)
    return layers


def _set_magnitude(layer: PeftLayer, magnitude: Tensor) -> None:
    """Copy DoRA's magnitude (d_out,) into a PEFT layer."""
    weight = layer.lora_magnitude_vector[ADAPTER].get_parameter("weight")
    weight.data = torch.tensor(magnitude.array(), device=weight.device)


def set_factors(
    layer: PeftLayer, a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]
) -> None:
    """Copy A (rank, d_in) and B (d_out, rank) into a PEFT layer."""
    with torch.no_grad():
        layer.lora_A[ADAPTER].weight.copy_(torch.tensor(a))
        layer.lora_B[ADAPTER].weight.copy_(torch.tensor(b))


def factors(layer: PeftLayer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Return the A (rank, d_in) and B (d_out, rank) of a PEFT layer."""
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    return a.get_parameter("weight"), b.get_parameter("weight")


def set_rank_scales(layer: PeftLayer, scales: torch.Tensor) -> None:
    """Multiply A·x by a scale for each rank, float32 (rank,), by a hook on PEFT's lora_A."""
    a = layer.lora_A[ADAPTER]
    a.register_buffer("rank_scales", scales, persistent=False)
    a.register_forward_hook(lambda module, inputs, output: output * module.rank_scales)


def rank_scales(layer: PeftLayer) -> torch.Tensor:
    """Return the scale of each rank of a PEFT layer, times the layer's own: (rank,) or ()."""
    a = layer.lora_A[ADAPTER]
    layer_scale = a.weight.new_tensor(layer.scaling[ADAPTER])
    scales: torch.Tensor | None = getattr(a, "rank_scales", None)
    return layer_scale if scales is None else scales * layer_scale


def learn_block_weights(layer: PeftLayer, spans: Sequence[slice], start: float) -> None:
    """Give each run of ranks a trainable weight, which multiplies A·x there; A and B are frozen.

    The weights are one float32 parameter, (len(spans),), all `start` at first.
    """
    a = layer.lora_A[ADAPTER]
    belongs = a.weight.new_zeros(len(spans), a.out_features)
    for row, span in zip(belongs, spans, strict=True):
        row[span] = 1
    a.register_buffer("block_ranks", belongs, persistent=False)
    a.register_parameter(
        "block_weights", torch.nn.Parameter(belongs.new_full((len(spans),), start))
    )
    a.register_forward_hook(
        lambda module, inputs, output: output * (module.block_weights @ module.block_ranks)
    )
    for factor in factors(layer):
        factor.requires_grad_(False)


def trained(layer: PeftLayer) -> dict[str, torch.nn.Parameter]:
    """Return what training changes in a PEFT layer: A and B, or the weights of its blocks."""
    weights: torch.nn.Parameter | None = getattr(layer.lora_A[ADAPTER], "block_weights", None)
    if weights is not None:
        return {"weights": weights}
    return dict(zip("AB", factors(layer), strict=True))


def check_fits(base: Base, adapter: Adapter) -> None:
    """Raise LorakitError naming the first module the base lacks or has in another shape."""
    shapes = projections(base.model)
    for module in adapter.modules():
        if module.name not in shapes:
            raise LorakitError(
                f"{adapter.name}: {base.name} has no module {module.name}; "
                "give the base the adapter was trained on by --model"
            )
        if module.shape != shapes[module.name]:
            raise LorakitError(
                f"{adapter.name}: {module.name} is {_dims(module.shape)}, in {base.name} it is "
                f"{_dims(shapes[module.name])}; give the base the adapter was trained on by --model"
            )


def _dims(shape: tuple[int, int]) -> str:
    """Return a shape as it is put in messages: `64×32`."""
    return f"{shape[0]}×{shape[1]}"
