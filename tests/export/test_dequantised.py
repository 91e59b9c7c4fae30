"""Adapters fused into quantised bases: against the model that transformers and PEFT dequantise."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorakit.errors import LorakitError
from lorakit.export.weight_files import INDEX
from tests.export.test_fuse import TINY, edit_config, fuse_files, run, stored
from tests.support.peft_models import random_model, with_lora

TARGETS = ["q_proj", "v_proj", "down_proj"]
IN_BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "nf4 stored in floats": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8 bits": {"load_in_8bit": True},
}


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, **options
    ).eval()


def save_in_bits(kind: str, folder: Path, *, shard: str = "1GB") -> None:
    """Save a random base that bitsandbytes has quantised, and PEFT's adapter on it."""
    base = random_model("llama").to(torch.bfloat16)
    base.save_pretrained(folder / "whole")
    config = transformers.BitsAndBytesConfig(**IN_BITS[kind])
    small = load(folder / "whole", quantization_config=config, dtype=torch.bfloat16)
    small.save_pretrained(folder / "base", max_shard_size=shard)
    with_lora(base, {"target_modules": TARGETS}).save_pretrained(folder / "adapter")


def merged_by_peft(base: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a dequantised base into which PEFT has merged the adapter."""
    merged = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    tensors: dict[str, torch.Tensor] = merged.state_dict()
    return tensors


def check_equal(fused: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert fused.keys() == theirs.keys()
    for key, tensor in theirs.items():
        adapted = any(name in key for name in TARGETS)
        torch.testing.assert_close(fused[key], tensor, rtol=0, atol=1e-6 if adapted else 0)


@pytest.mark.parametrize("shard", ["1GB", "4KB"])
@pytest.mark.parametrize("kind", IN_BITS)
def test_the_tensors_are_those_of_the_model_that_transformers_dequantises(
    kind: str, shard: str, tmp_path: Path
) -> None:
    save_in_bits(kind, tmp_path, shard=shard)
    assert (tmp_path / "base" / INDEX).exists() == (shard == "4KB")
    fused = fuse_files(tmp_path, dtype="float32")
    base = load(tmp_path / "base", dtype=torch.float32).dequantize().float()
    check_equal(stored(fused), merged_by_peft(base, tmp_path))


@pytest.mark.parametrize("kind", ["nf4 twice", "8 bits"])
def test_the_fused_model_is_a_plain_one_in_the_configs_format(kind: str, tmp_path: Path) -> None:
    save_in_bits(kind, tmp_path)
    folder = fuse_files(tmp_path)
    exact = stored(fuse_files(tmp_path, "exact", dtype="float32"))
    for key, tensor in stored(folder).items():
        assert torch.equal(tensor, exact[key].to(torch.bfloat16))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(load(folder, dtype="auto").lm_head) is torch.nn.Linear


def save_in_fp8(folder: Path) -> None:
    """Save a random base whose projections are fp8 by blocks of 16×16, but for one of one scale."""
    base = random_model("llama")
    base.save_pretrained(folder / "base")
    weights = load_file(folder / "base" / "model.safetensors")
    for key in [key for key in weights if "_proj" in key]:
        rows, columns = weights[key].shape
        blocks = weights[key].reshape(rows // 16, 16, columns // 16, 16)
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        weights[key] = (blocks / scales).to(torch.float8_e4m3fn).reshape(rows, columns)
        weights[f"{key}_scale_inv"] = scales[:, 0, :, 0].contiguous()
    save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})
    quantised = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    edit_config(folder / "base", quantization_config=quantised)
    with_lora(base, {"target_modules": TARGETS}).save_pretrained(folder / "adapter")


def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    save_in_fp8(tmp_path)
    fused = fuse_files(tmp_path, dtype="float32")
    config = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    base = load(tmp_path / "base", dtype=torch.float32, quantization_config=config)
    check_equal(stored(fused), merged_by_peft(base, tmp_path))


def save_in_mxfp4(folder: Path) -> None:
    """Save a random mixture whose experts are mxfp4, and PEFT's adapter on its attention."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "vocab_size": 50,
    }
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(transformers.GptOssConfig(**sizes))
    base.to(torch.bfloat16).save_pretrained(folder / "base")
    weights = load_file(folder / "base" / "model.safetensors")
    for key in [key for key in weights if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = weights.pop(key).shape
        shape = (experts, outer, inner // 32)
        weights[f"{key}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        weights[f"{key}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
    save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})
    edit_config(folder / "base", quantization_config={"quant_method": "mxfp4"})
    with_lora(base, {"target_modules": ["q_proj", "v_proj"]}).save_pretrained(folder / "adapter")


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    save_in_mxfp4(tmp_path)
    fused = fuse_files(tmp_path, dtype="float32")
    base = load(tmp_path / "base", dtype=torch.float32)
    check_equal(stored(fused), merged_by_peft(base, tmp_path))


# — What cannot be dequantised —

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Weights = dict[str, torch.Tensor]


def _state(**fields: object) -> Callable[[Weights], None]:
    """Return a change of what the file says of a 4-bit weight."""

    def change(weights: Weights) -> None:
        key = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(weights[key].tolist())), **fields}
        weights[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _cut(name: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name] = weights[name][:-1].clone()

    return change


def _drop(name: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        del weights[name]

    return change


DAMAGE: dict[str, tuple[str, Callable[[Weights], object], str]] = {
    "larger than its bytes": ("nf4", _state(shape=[32, 3200]), "512 in weight, not 51200"),
    "negative": ("nf4", _state(shape=[-32, -32]), "does not know"),
    "another type": ("nf4", _state(quant_type="int4"), "does not know"),
    "no type of numbers": ("nf4", _state(dtype="load"), "does not know"),
    "blocks of nothing": ("nf4", _state(blocksize=0), "does not know"),
    "blocks of a text": ("nf4", _state(blocksize="64"), "does not know"),
    "few scales": ("nf4", _cut(f"{Q_PROJ}.absmax"), "15 in absmax, not 16"),
    "few levels": ("nf4", _cut(f"{Q_PROJ}.quant_map"), "15 in quant_map, not 16"),
    "few nested scales": ("nf4 twice", _cut(f"{Q_PROJ}.nested_absmax"), "buffer length"),
    "few nested levels": ("nf4 twice", _cut(f"{Q_PROJ}.nested_quant_map"), "255 in nested_quant"),
    "no scales": ("nf4", _drop(f"{Q_PROJ}.absmax"), "no 'absmax'"),
    "no weight": ("nf4", _drop(Q_PROJ), "no 'weight'"),
    "few rows": ("8 bits", _cut(Q_PROJ.replace("weight", "SCB")), "31 in SCB, not 32"),
    "rows in another order": (
        "8 bits",
        lambda weights: weights[Q_PROJ.replace("weight", "weight_format")].fill_(1),
        "rows in another order",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_parts_that_do_not_fit_each_other_are_named(case: str, tmp_path: Path) -> None:
    kind, damage, message = DAMAGE[case]
    save_in_bits(kind, tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    damage(weights)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(LorakitError, match=rf"{Q_PROJ} does not fit .*{message}"):
        fuse_files(tmp_path)
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.ones(3, 2), "32×32 values in 3×2 blocks"),
        (torch.ones(0, 2), "32×32 values in 0×2 blocks"),
        (torch.ones(2, 2, dtype=torch.uint8), "formats F8_E4M3 and U8"),
        (torch.ones(2, 2, 2), "too many values to unpack"),
    ],
    ids=["odd", "none", "whole numbers", "three axes"],
)
def test_a_grid_of_scales_that_does_not_fit_is_named(
    scales: torch.Tensor, message: str, tmp_path: Path
) -> None:
    save_in_fp8(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(path), f"{Q_PROJ}_scale_inv": scales}, path, {"format": "pt"})
    with pytest.raises(LorakitError, match=message):
        fuse_files(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "torchao"])
def test_what_cannot_be_dequantised_names_the_way_out(method: str, tmp_path: Path) -> None:
    save_in_fp8(tmp_path)
    edit_config(tmp_path / "base", quantization_config={"quant_method": method, "bits": 4})
    message = rf"is quantised \({method}\), .*; give the model it was made from by --model$"
    with pytest.raises(LorakitError, match=message):
        fuse_files(tmp_path)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_in_bits("nf4", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LorakitError, match=r"needs bitsandbytes; run: pip install 'lorakit\[quant"):
        fuse_files(tmp_path)


# — The command —


@pytest.mark.parametrize("kind", ["nf4 twice", "8 bits"])
def test_the_command_checks_the_logits_of_the_dequantised_base(kind: str, tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(**IN_BITS[kind])
    load(TINY, quantization_config=config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(load(TINY), lora).save_pretrained(str(tmp_path / "adapter"))
    done = run(tmp_path / "adapter", "--model", tmp_path / "base", "-o", tmp_path / "fused")
    assert done.exit_code == 0, done.stderr or done.exception
    assert "too coarse" not in done.stderr
    assert load(tmp_path / "fused").config.to_dict().get("quantization_config") is None
