"""Merges without data against PEFT: its loader and logits, and its own merges, right and wrong.

Where PEFT's add_weighted_adapter is known to be wrong, a test says that it still is and that
lorakit's merge is what the dense matrices give. `add_weighted_adapter` is called as in PEFT 0.21.
"""

from __future__ import annotations

import copy
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.merging.methods import METHODS
from lorakit.merging.static import merge_adapters
from lorakit.settings import StaticSettings
from tests.support.peft_models import logits, random_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

WEIGHTS = [1.0, -0.5]
NAMES = ("one", "two", "three")  # PEFT mistakes the name `0` for a layer's when it saves
Deltas = dict[str, Any]  # ΔW by module, float64


def peft_model(configs: list[dict[str, Any]], family: str = "llama") -> Any:
    """Return PEFT's model with the random adapters of these configs."""
    given = [peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}) for config in configs]
    model = peft.get_peft_model(random_model(family), given[0], adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], given[1:], strict=False):
        model.add_adapter(name, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return model.eval()


def peft_deltas(model: Any, adapter: str) -> Deltas:
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter)
        .detach()
        .double()
        .numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and adapter in layer.lora_A
    }


def peft_merge(model: Any, kind: str, weights: list[float], **given: Any) -> Deltas:
    names = list(NAMES[: len(weights)])
    model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **given)
    return peft_deltas(model, "merged")


def saved(model: Any, folder: Path) -> list[Adapter]:
    """Return the adapters of a PEFT model, through PEFT's files."""
    names = list(model.peft_config)
    model.save_pretrained(folder, selected_adapters=names)
    return [load_adapter(str(folder / name)) for name in names]


def our_merge(adapters: list[Adapter], method: str, weights: list[float], **given: Any) -> Adapter:
    settings = StaticSettings(weights=tuple(weights), **given)
    return merge_adapters(adapters, method, settings=settings)


def our_deltas(adapter: Adapter) -> Deltas:
    return {module.name: module.delta() for module in adapter.modules()}


def truth(model: Any, weights: list[float]) -> Deltas:
    summed: Deltas = {}
    for adapter, weight in zip(NAMES, weights, strict=False):
        for name, delta in peft_deltas(model, adapter).items():
            summed[name] = summed.get(name, 0) + weight * delta
    return summed


def distance(one: Deltas, other: Deltas) -> float:
    """Return ‖one − other‖/‖other‖, over all modules together."""
    assert one.keys() == other.keys()
    difference = sum(float(np.sum((one[name] - other[name]) ** 2)) for name in one)
    return float(np.sqrt(difference / sum(float(np.sum(delta**2)) for delta in other.values())))


Q: dict[str, Any] = {"target_modules": ["q_proj"]}
RSLORA: dict[str, Any] = {**Q, "use_rslora": True}


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_where_peft_is_right_both_give_the_weighted_sum(method: str, tmp_path: Path) -> None:
    model = peft_model([Q, {**Q, "r": 3}])
    adapters = saved(model, tmp_path)
    given = {"svd_rank": 7} if method == "svd" else {}
    theirs = peft_merge(model, method, [1.0, 0.5], **given)
    ours = our_merge(adapters, method, [1.0, 0.5], rank=7)
    assert distance(theirs, truth(model, [1.0, 0.5])) < 1e-5
    assert distance(our_deltas(ours), truth(model, [1.0, 0.5])) < 1e-5


@pytest.mark.parametrize(
    ("method", "kind"), [("ties", "ties_svd"), ("magnitude-prune", "magnitude_prune_svd")]
)
def test_where_peft_acts_on_the_deltas_both_agree(method: str, kind: str, tmp_path: Path) -> None:
    model = peft_model([Q, Q, Q])
    adapters = saved(model, tmp_path)
    theirs = peft_merge(model, kind, [0.5] * 3, svd_rank=32, density=0.3)
    ours = our_merge(adapters, method, [0.5] * 3, rank=32, density=Decimal("0.3"))
    assert distance(our_deltas(ours), theirs) < 1e-5


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_pefts_linear_keeps_cross_terms_and_ours_do_not(method: str, tmp_path: Path) -> None:
    model = peft_model([Q, Q])
    adapters = saved(model, tmp_path)
    assert distance(peft_merge(model, "linear", [1.0, 1.0]), truth(model, [1.0, 1.0])) > 0.5
    ours = our_merge(adapters, method, [1.0, 1.0], rank=8)
    assert distance(our_deltas(ours), truth(model, [1.0, 1.0])) < 1e-5


@pytest.mark.parametrize(
    ("kind", "method"), [("cat", "cat"), ("linear", "linear"), ("svd", "svd"), ("ties", "ties")]
)
def test_pefts_merges_of_rslora_are_the_root_of_the_rank_too_large_and_ours_are_not(
    kind: str, method: str, tmp_path: Path
) -> None:
    model = peft_model([RSLORA])
    adapters = saved(model, tmp_path)
    theirs = peft_merge(model, kind, [1.0], **({"density": 0.9999} if kind == "ties" else {}))
    twice = {name: 2 * delta for name, delta in truth(model, [1.0]).items()}  # √4
    assert distance(theirs, twice) < 1e-5
    assert distance(our_deltas(our_merge(adapters, method, [1.0])), truth(model, [1.0])) < 1e-5


def test_pefts_factor_wise_ties_is_not_that_of_the_deltas(tmp_path: Path) -> None:
    model = peft_model([Q, Q])
    adapters = saved(model, tmp_path)
    factor_wise = peft_merge(model, "ties", [1.0, 1.0], density=0.5)
    model.delete_adapter("merged")
    on_deltas = peft_merge(model, "ties_svd", [1.0, 1.0], density=0.5, svd_rank=32)
    ours = our_merge(adapters, "ties", [1.0, 1.0], density=Decimal("0.5"), rank=32)
    assert distance(our_deltas(ours), on_deltas) < 1e-5
    assert distance(factor_wise, on_deltas) > 0.5


KINDS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "plain": ("llama", [Q, Q]),
    "rslora and plain": ("llama", [RSLORA, {**Q, "r": 2}]),
    "patterns": (
        "llama",
        [
            {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
            {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"layers.1.*": 3}},
        ],
    ),
    "layers": ("llama", [{**Q, "layers_to_transform": [0, 2]}, {"target_modules": "all-linear"}]),
    "conv1d": (
        "gpt2",
        [
            {"target_modules": ["c_attn"], "fan_in_fan_out": True},
            {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 2},
        ],
    ),
}


@pytest.mark.parametrize("portable", [False, True], ids=["", "portable"])
@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_loads_in_peft_and_gives_the_logits_of_the_sum(
    kind: str, method: str, portable: bool, tmp_path: Path
) -> None:
    family, configs = KINDS[kind]
    model = peft_model(configs, family)
    adapters = saved(model, tmp_path / "theirs")
    merged = merge_adapters(
        adapters,
        method,
        settings=StaticSettings(weights=tuple(WEIGHTS), rank=8),
        portable=portable,
    )
    save_adapter(merged, str(tmp_path / "ours") + "/")
    base = random_model(family)
    loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    add_(base, truth(model, WEIGHTS))
    torch.testing.assert_close(logits(loaded.eval()), logits(base), rtol=0, atol=2e-5)


def add_(base: Any, deltas: Deltas) -> None:
    """Add ΔW, as PEFT lays it out, to the weights of a model."""
    for name, delta in deltas.items():
        weight = base.get_submodule(name).weight
        weight.data += torch.from_numpy(delta).to(weight.dtype)


@pytest.mark.parametrize("method", METHODS)
def test_what_every_method_writes_loads_in_peft_with_its_own_deltas(
    method: str, tmp_path: Path
) -> None:
    model = peft_model([RSLORA, {"target_modules": ["q_proj", "v_proj"], "r": 3}])
    adapters = saved(model, tmp_path / "theirs")
    merged = our_merge(adapters, method, WEIGHTS, density=Decimal("0.5"))
    save_adapter(merged, str(tmp_path / "ours") + "/")
    loaded: Any = peft.PeftModel.from_pretrained(random_model("llama"), str(tmp_path / "ours"))
    assert distance(our_deltas(merged), peft_deltas(loaded, "default")) < 1e-6
