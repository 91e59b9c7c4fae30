"""Stripping: PEFT with the upper layers' LoRA at scale 0 is the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import pytest
import torch
import transformers

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.blocks import share_of_zeros
from lorakit.adapters.history import HistoryEntry, parse_header
from lorakit.adapters.names import layer_of, lora_name
from lorakit.adapters.safetensors import read_tensors
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.adapters.tensors import Tensor
from lorakit.boundary.strip import strip_layers, write_stripped
from lorakit.errors import LorakitError
from lorakit.merging.stack import fold, stack
from tests.support.adapters import tiny
from tests.support.peft_models import KINDS, logits, random_model, with_lora
from tests.support.program import run

torch.set_num_threads(1)

# PEFT's own use of a name transformers renamed. Any other warning, such as PEFT's of a missing or
# unexpected tensor, is an error here: what lorakit writes loads without one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

QV = ["q_proj", "v_proj"]
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "full names": (
        "llama",
        {"target_modules": [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]},
    ),
    "a full name and a last part": (
        "llama",
        {"target_modules": ["model.layers.2.self_attn.q_proj", "v_proj"]},
    ),
    "other targets above": (
        "llama",
        {"target_modules": ["q_proj", "layers.2.self_attn.v_proj"]},
    ),
    "conv1d, parts of names": (
        "gpt2",
        {"target_modules": ["attn.c_proj", "c_attn"], "fan_in_fan_out": True},
    ),
    "rank pattern of upper layers": (
        "llama",
        {"target_modules": QV, "rank_pattern": {r"layers\.2\..*": 6, "q_proj": 3}},
    ),
}
ALL_KINDS = {**KINDS, **MORE}


def switched_off(model: Any, kept: set[int]) -> Any:
    """Set the scale of PEFT's LoRA to 0 on every layer but those kept; return the model."""
    for name, module in model.named_modules():
        layer = layer_of(name.removeprefix("base_model.model."))
        if hasattr(module, "lora_A") and layer is not None and layer not in kept:
            module.scaling["default"] = 0.0
    return model


def loaded_by_peft(base: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize("kept", [{0}, {0, 1}, {2}, {0, 2}], ids=str)
@pytest.mark.parametrize(("family", "fields"), ALL_KINDS.values(), ids=ALL_KINDS.keys())
def test_peft_gives_the_logits_of_the_model_whose_other_lora_is_off(
    family: str, fields: dict[str, Any], kept: set[int], tmp_path: Path
) -> None:
    base = random_model(family)
    config = {"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM", **fields}
    model = with_lora(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "whole", save_embedding_layers=False)
    adapter = load_adapter(str(tmp_path / "whole"))
    if not any(module.layer in kept for module in adapter.modules()):
        with pytest.raises(LorakitError, match="use the base model"):
            strip_layers(adapter, keep=kept)
        return
    write_stripped(adapter, f"{tmp_path / 'stripped'}/", keep=kept)
    again = loaded_by_peft(base, tmp_path / "stripped")
    whole = logits(model)
    expected = logits(switched_off(model, kept))
    assert torch.equal(logits(again), expected)
    lost = {module.layer for module in adapter.modules()} - kept - {None}
    assert torch.equal(whole, expected) == (not lost)


@pytest.mark.parametrize("boundary", [1, 2])
def test_a_merged_adapter_is_stripped_with_its_blocks(boundary: int, tmp_path: Path) -> None:
    base = random_model("llama")
    parts = []
    kinds: list[dict[str, Any]] = [{"r": 2}, {"r": 3, "layers_to_transform": [0, 2]}]
    for number, fields in enumerate(kinds):
        model = with_lora(copy.deepcopy(base), {"target_modules": QV, "lora_alpha": 5, **fields})
        model.save_pretrained(tmp_path / str(number))
        parts.append(load_adapter(str(tmp_path / str(number))))
    stacked = stack(parts)
    factors = dict(fold(stacked.factors, stacked))
    q = "model.layers.0.self_attn.q_proj"
    factors[q][0][3:] = 0  # all of the second block's rows but one
    blocks = [b.fields(share_of_zeros(b.pairs(factors)), 0.5) for b in stacked.blocks]
    config = peft_config(stacked.ranks, base=None)
    merged = Adapter(tensors_of(factors), config, {"format": 1, "blocks": blocks}, "merged")
    save_adapter(merged, f"{tmp_path / 'merged'}/")
    write_stripped(merged, f"{tmp_path / 'out'}/", boundary=boundary)
    model = loaded_by_peft(copy.deepcopy(base), tmp_path / "merged")
    again = loaded_by_peft(base, tmp_path / "out")
    assert torch.equal(logits(again), logits(switched_off(model, set(range(boundary)))))
    stripped = load_adapter(str(tmp_path / "out"))
    names = {module.name for module in stripped.modules()}
    left = {name: tensor for name, tensor in factors.items() if name in names}
    for block, original, part in zip(
        stripped.header["blocks"], blocks, stacked.blocks, strict=True
    ):
        kept = {name: place for name, place in original["modules"].items() if name in names}
        assert block["modules"] == kept
        assert ("reset" in block) == (kept == original["modules"])
        inner = type(part)(part.name, part.sha256, {n: part.modules[n] for n in kept})
        assert block["zeros"] == share_of_zeros(inner.pairs(left))
    assert stripped.header["blocks"][1]["zeros"] > blocks[1]["zeros"]


def test_a_block_without_modules_is_no_block() -> None:
    below, above = (f"model.layers.{n}.self_attn.q_proj" for n in range(2))
    parts = {"below": {below: {"offset": 0, "rank": 2}}, "above": {above: {"offset": 0, "rank": 2}}}
    blocks = [{"name": name, "modules": modules} for name, modules in parts.items()]
    header: Any = {"blocks": [*blocks, None]}
    given = Adapter(tiny().tensors, tiny().config, header, "x")
    stripped = strip_layers(given, boundary=1)
    assert [block["name"] for block in stripped.header["blocks"]] == ["below"]


@pytest.mark.parametrize("chosen", [{"boundary": 2}, {"boundary": 99}, {"keep": range(9)}], ids=str)
def test_where_nothing_goes_tensors_and_config_are_the_same(chosen: Any) -> None:
    adapter = tiny(layers_to_transform=[0, 1], rank_pattern={"q_proj": 2, "none": 3})
    stripped = strip_layers(adapter, **chosen)
    assert stripped.tensors == adapter.tensors
    assert stripped.config == adapter.config
    assert stripped.sha256 == adapter.sha256


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_kept_tensors_stay_byte_for_byte(dtype: str, tmp_path: Path) -> None:
    adapter = tiny(layers=4, dtype=dtype)
    write_stripped(adapter, str(tmp_path / "out.safetensors"), boundary=3)
    tensors, _ = read_tensors(tmp_path / "out.safetensors", "out")
    expected = {key: one for key, one in adapter.tensors.items() if "layers.3." not in key}
    assert tensors == expected


def test_layers_without_lora_are_fine() -> None:
    tensors = {key: one for key, one in tiny(layers=4).tensors.items() if "layers.1." not in key}
    stripped = strip_layers(
        Adapter(tensors, tiny(layers_to_transform=[0, 2, 3]).config), boundary=3
    )
    assert {module.layer for module in stripped.modules()} == {0, 2}
    assert stripped.config["layers_to_transform"] == [0, 2]


def test_what_lies_outside_the_layers_is_kept() -> None:
    head = {
        lora_name("lm_head", "A"): Tensor.from_array(np.ones((2, 4))),
        lora_name("lm_head", "B"): Tensor.from_array(np.ones((9, 2))),
    }
    whole = Adapter({**tiny().tensors, **head}, tiny(target_modules=[*QV, "lm_head"]).config)
    for boundary, layers in ((1, {0, None}), (2, {0, 1, None})):
        stripped = strip_layers(whole, boundary=boundary)
        assert {module.layer for module in stripped.modules()} == layers
    assert {module.name for module in strip_layers(whole, keep=[7]).modules()} == {"lm_head"}


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"boundary": 0}, "boundary 0 leaves no LoRA in tiny; use the base model"),
        ({"keep": [2]}, "tiny has no LoRA on the layers to keep; use the base model"),
        ({"keep": []}, "tiny has no LoRA on the layers to keep; use the base model"),
    ],
    ids=str,
)
def test_an_adapter_of_nothing_is_refused(chosen: Any, reason: str) -> None:
    with pytest.raises(LorakitError, match=f"^{reason}"):
        strip_layers(tiny(), **chosen)


def test_a_boundary_below_all_lora_is_refused() -> None:
    upper = strip_layers(tiny(), keep=[1])
    with pytest.raises(LorakitError, match="has no LoRA below layer 1; use the base model"):
        strip_layers(upper, boundary=1)


def test_layers_in_two_places_are_refused() -> None:
    tensors = dict(tiny().tensors)
    factors: tuple[Literal["A", "B"], ...] = ("A", "B")
    for factor in factors:
        other = lora_name("encoder.layers.0.self_attn.q_proj", factor)
        tensors[other] = tensors[lora_name("model.layers.0.self_attn.q_proj", factor)]
    with pytest.raises(LorakitError, match=r"in 'encoder.layers' and in 'model.layers', so"):
        strip_layers(Adapter(tensors, tiny().config), boundary=1)


def test_patterns_that_fit_no_module_any_more_go_and_the_others_keep_their_order() -> None:
    ranks = {"layers.1.*v_proj": 2, "v_proj": 2, "q_proj": 2, "k_proj": 9}
    stripped = strip_layers(tiny(rank_pattern=ranks, alpha_pattern={"1.*": 3}), boundary=1)
    assert list(stripped.config["rank_pattern"]) == ["v_proj", "q_proj"]
    assert stripped.config["alpha_pattern"] == {}
    assert stripped.config["target_modules"] == ["v_proj", "q_proj"]
    assert stripped.config["layers_to_transform"] == [0]


def test_the_history_goes_on_and_names_the_parent(tmp_path: Path) -> None:
    earlier: HistoryEntry = {"command": "merge", "settings": {"lr": 1.0}}
    adapter = Adapter(tiny().tensors, tiny().config, {"history": [earlier], "chat": "on"}, "d/m.st")
    returned = write_stripped(adapter, str(tmp_path / "out"), boundary=1)
    loaded = load_adapter(str(tmp_path / "out"))
    assert loaded.header == returned.header
    assert loaded.header["chat"] == "on"
    first, entry = loaded.header["history"]
    assert first == earlier
    assert entry["command"] == "strip-layers"
    assert entry["settings"] == {"boundary": 1}
    assert entry["parents"] == {"m": adapter.sha256}
    assert loaded.header == strip_layers(adapter, boundary=1).header
    assert parse_header(json.dumps(loaded.header), {}, "x")


@pytest.mark.parametrize("place", ["kept", "dropped"])
@pytest.mark.parametrize("output", ["out.safetensors", "folder/", "folder", "-"])
def test_values_that_are_not_finite_are_found_wherever_they_are(
    place: str, output: str, tmp_path: Path
) -> None:
    adapter = tiny(layers=3)
    name = lora_name(adapter.modules()[0 if place == "kept" else -1].name, "A")
    values = adapter.tensors[name].array().copy()
    values[-1, -1] = np.inf
    tensors = {**adapter.tensors, name: Tensor.from_array(values)}
    save_adapter(Adapter(tensors, adapter.config), str(tmp_path / "bad.safetensors"))
    done = run("strip-layers", "bad.safetensors", "--boundary", "1", "-o", output, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: bad.safetensors: tensor '{name}' holds values that are not finite; "
        "train it again\n"
    )
    assert done.stdout == ""
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["bad.safetensors"]


def test_stripping_twice_is_stripping_once_but_for_the_history() -> None:
    adapter = tiny(layers=4)
    twice = strip_layers(strip_layers(adapter, boundary=3), boundary=2)
    once = strip_layers(adapter, boundary=2)
    assert twice.tensors == once.tensors
    assert twice.config == once.config
    assert len(twice.header["history"]) == 2


def test_an_adapter_may_be_stripped_in_its_own_place(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_adapter(tiny(layers=3), str(path))
    write_stripped(load_adapter(str(path)), str(path), boundary=2)
    assert {module.layer for module in load_adapter(str(path)).modules()} == {0, 1}


def test_the_gpt2_adapter_found_is_stripped(shared: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_positions=16))
    source = shared / "adapters" / "huggingface__trl"
    model = loaded_by_peft(copy.deepcopy(base.eval()), source)
    adapter = load_adapter(str(source))
    layers = {module.layer for module in adapter.modules()}
    assert len(layers) > 5
    write_stripped(adapter, f"{tmp_path / 'out'}/", boundary=5)
    again = loaded_by_peft(base, tmp_path / "out")
    assert torch.equal(logits(again), logits(switched_off(model, set(range(5)))))
