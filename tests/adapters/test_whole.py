"""Adapters that hold more than A and B: read and written again as PEFT has them, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from lorakit.adapters.describe import inspect_adapter
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.adapters.whole import is_saved
from lorakit.errors import LorakitError
from tests.support.adapters import save_tensors, tiny
from tests.support.peft_models import MORE_KINDS, logits, random_model, with_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("kind", MORE_KINDS)
@pytest.mark.parametrize("output", ["ours/", "ours.safetensors"])
def test_what_is_written_again_gives_pefts_logits(kind: str, output: str, tmp_path: Path) -> None:
    family, config = MORE_KINDS[kind]
    base = random_model(family)
    model = with_lora(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    adapter = load_adapter(str(tmp_path / "theirs"), plain=False)
    save_adapter(adapter, f"{tmp_path}/{output}")
    again = load_adapter(f"{tmp_path}/{output}", plain=False)
    assert again.sha256 == adapter.sha256
    if output.endswith("/"):
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
        assert torch.equal(logits(theirs), logits(model))
    with pytest.raises(LorakitError, match="fuse it and go on with that model: lorakit fuse"):
        load_adapter(str(tmp_path / "theirs"))


def test_embeddings_that_peft_adds_are_kept(tmp_path: Path) -> None:
    base = random_model("llama")
    model = with_lora(base, {"target_modules": ["q_proj", "lm_head"]})
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = load_adapter(str(tmp_path), plain=False)
    assert "lm_head.weight" in adapter.whole
    head = base.lm_head.base_layer.weight.detach().numpy()
    assert np.array_equal(adapter.whole["lm_head.weight"].array(), head)


def test_inspect_names_what_is_whole_and_dora(tmp_path: Path) -> None:
    model = with_lora(*_of("DoRA and a head"))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    record = inspect_adapter(load_adapter(str(tmp_path), plain=False))
    assert (record["whole"], record["use_dora"]) == (["lm_head.weight"], True)
    assert {"whole", "use_dora"}.isdisjoint(inspect_adapter(tiny()))


def _of(kind: str) -> tuple[Any, dict[str, Any]]:
    family, config = MORE_KINDS[kind]
    return random_model(family), config


ONES = Tensor.from_array(np.ones((4, 4)))
MAGNITUDE = Tensor.from_array(np.ones(4))
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "magnitude without use_dora": (
        {f"{Q}.lora_magnitude_vector": MAGNITUDE},
        {},
        "lora_magnitude_vector' belongs to DoRA",
    ),
    "use_dora without magnitudes": (
        {},
        {"use_dora": True},
        "'model.layers.0.self_attn.q_proj' has no lora_magnitude_vector",
    ),
    "magnitude of another length": (
        {f"{Q}.lora_magnitude_vector": Tensor.from_array(np.ones(3))},
        {"use_dora": True},
        r"has shape \(3,\), not \(4,\)",
    ),
    "module that is not saved": (
        {"base_model.model.model.norm.weight": MAGNITUDE},
        {"modules_to_save": ["lm_head"]},
        "norm.weight' is no LoRA factor, nor of a module in modules_to_save",
    ),
    "saved module that has LoRA": (
        {f"{Q}.weight": ONES},
        {"modules_to_save": ["q_proj"]},
        "q_proj.weight' is no LoRA factor",
    ),
    "base layer without LoRA": (
        {"base_model.model.lm_head.base_layer.weight": ONES},
        {"modules_to_save": ["lm_head"]},
        "is a copy of the base's own that PEFT would drop",
    ),
    "infinity in a head": (
        {"base_model.model.lm_head.weight": Tensor.from_array(np.array([[np.inf]]))},
        {"modules_to_save": ["lm_head"]},
        "holds values that are not finite",
    ),
    "a regular expression": ({}, {"modules_to_save": "lm_head"}, "must be a list of names"),
}


@pytest.mark.parametrize(("changes", "fields", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_peft_would_not_load_is_refused_by_name(
    changes: dict[str, Tensor], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapter = tiny(**fields)
    path = tmp_path / "x.safetensors"
    save_tensors({**adapter.tensors, **changes}, path, adapter_config=json.dumps(adapter.config))
    with pytest.raises(LorakitError, match=message) as caught:
        load_adapter(str(path), plain=False)
    assert str(caught.value).isprintable()


def test_a_file_of_whole_weights_alone_is_no_adapter(tmp_path: Path) -> None:
    tensors = {"base_model.model.lm_head.weight": ONES}
    config = {**tiny().config, "modules_to_save": ["lm_head"]}
    save_tensors(tensors, tmp_path / "x.safetensors", adapter_config=json.dumps(config))
    with pytest.raises(LorakitError, match=r"lm_head.weight' is a copy of the base's own"):
        load_adapter(str(tmp_path / "x.safetensors"), plain=False)


@pytest.mark.parametrize("names", [["norm"], ["1.mlp"], ["model.norm", "lm_head"], ["head"]])
def test_saved_modules_are_those_that_peft_wraps(names: list[str]) -> None:
    base = random_model("llama")
    modules = [name for name, _ in base.named_modules() if name]
    config: dict[str, Any] = {"modules_to_save": names}
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], **config))
    wrapped = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.utils.other.ModulesToSaveWrapper)
    }
    inside = {name for name in modules if any(f"{name}.".startswith(f"{w}.") for w in wrapped)}
    assert {name for name in modules if is_saved(config, name)} == inside
    assert inside
