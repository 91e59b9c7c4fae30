"""Adapters of PEFT's: its own loading, logits and get_delta_weight are the oracles."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import lora_name
from lorakit.adapters.safetensors import read_tensors
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from tests.support.adapters import save_tensors, tiny
from tests.support.peft_models import KINDS, logits, random_model, with_lora
from tests.support.program import shell

FOUND = Path(__file__).parents[3] / "shared" / "adapters"
CONFIGS = sorted((FOUND / "configs").glob("*.json"))
needs_found = pytest.mark.skipif(not FOUND.is_dir(), reason="the adapters found are not here")

torch.set_num_threads(1)

# PEFT's own use of a name transformers renamed. Any other warning, such as PEFT's of a key or a
# tensor it does not know, is an error here: what lorakit writes loads without one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """Return PEFT's ΔW (d_out, d_in) by module."""
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    return {
        name: layer.get_delta_weight("default").T
        if layer.fan_in_fan_out
        else layer.get_delta_weight("default")
        for name, layer in layers.items()
    }


def check_same_deltas(adapter: Adapter, model: Any) -> None:
    theirs = deltas(model)
    ours = {module.name: module for module in adapter.modules()}
    assert set(ours) == set(theirs)
    for name, module in ours.items():
        expected = theirs[name].detach().double().numpy()
        assert module.shape == expected.shape
        error = np.linalg.norm(module.delta() - expected) / np.linalg.norm(expected)
        assert error < 1e-6
        assert module.norm() == pytest.approx(float(np.linalg.norm(module.delta())), rel=1e-9)


@pytest.mark.parametrize(("family", "fields"), KINDS.values(), ids=KINDS.keys())
def test_an_adapter_of_peft_keeps_its_deltas_and_its_logits(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    config = {"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM", **fields}
    base = random_model(family)
    model = with_lora(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    adapter = load_adapter(str(tmp_path / "theirs"))
    check_same_deltas(adapter, model)
    save_adapter(adapter, str(tmp_path / "ours") + "/")
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly_and_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = with_lora(random_model("llama"), {"r": 4, "target_modules": ["q_proj"]})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(str(tmp_path / "theirs"))
    saved = safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    for name, tensor in saved.items():
        assert np.array_equal(adapter.tensors[name].array(), tensor.float().numpy())
    save_adapter(adapter, str(tmp_path / "ours.safetensors"))
    again = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    assert {tensor.dtype for tensor in again.values()} == {dtype}


def test_the_single_file_put_in_a_folder_loads_in_peft(tmp_path: Path) -> None:
    base = random_model("llama")
    model = with_lora(copy.deepcopy(base), {"r": 4, "target_modules": ["q_proj"]})
    model.save_pretrained(tmp_path / "theirs")
    single = tmp_path / "x.safetensors"
    save_adapter(load_adapter(str(tmp_path / "theirs")), str(single))
    folder = tmp_path / "ours"
    folder.mkdir()
    config = read_tensors(single, "x")[1]["adapter_config"]
    (folder / "adapter_config.json").write_text(config)
    single.rename(folder / "adapter_model.safetensors")
    again = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    assert torch.equal(logits(again), logits(model))


@needs_found
def test_the_gpt2_adapter_found_gives_the_logits_it_gives_through_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16)
    base = transformers.GPT2LMHeadModel(config).eval()
    model: Any = peft.PeftModel.from_pretrained(base, str(FOUND / "huggingface__trl")).eval()
    expected = logits(model)
    adapter = load_adapter(str(FOUND / "huggingface__trl"))
    check_same_deltas(adapter, model)
    save_adapter(adapter, str(tmp_path / "ours") + "/")
    again: Any = peft.PeftModel.from_pretrained(model.unload(), str(tmp_path / "ours")).eval()
    assert torch.equal(logits(again), expected)


FOUND_REFUSED = {
    "huggingface__trl/nothing": "cannot read",
    "ml-explore__mlx-lm": "MLX",
    "ml-explore__mlx-lm/adapters.safetensors": "lora_a' is MLX's",
    "wyek1n__MLX-CLI": "MLX",
    "wyek1n__MLX-CLI/adapters.safetensors": "lora_a' is MLX's",
    "wyek1n__MLX-CLI/0000100_adapters.safetensors": "lora_a' is MLX's",
    "wujindou__BLOOM-LORA": "enable_lora is set",
    "wujindou__BLOOM-LORA/adapter_model.bin": "pickle.*run: lorakit convert",
    "peft-regression/ia3_mlp-0.6.1": "peft_type is 'IA3'",
    "peft-regression/lora_mlp-0.6.1": "pickle.*run: lorakit convert",
    "peft-regression/lora_mlp_modules_to_save-0.6.1": "pickle.*run: lorakit convert",
    "peft-regression/lora_mlp-0.6.1/output.pt": "pickle",
}


@needs_found
@pytest.mark.parametrize(("path", "message"), FOUND_REFUSED.items())
def test_the_other_adapters_found_are_refused_in_one_line(path: str, message: str) -> None:
    with pytest.raises(LorakitError, match=message) as caught:
        load_adapter(str(FOUND / path))
    assert str(caught.value).isprintable()


def _family(config: Mapping[str, Any]) -> str:
    base = str(config["base_model_name_or_path"]).lower()
    return next((name for name in ("gpt2", "opt", "bloom") if name in base), "llama")


CONFIG_REFUSED = {"use_bdlora"}


@needs_found
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem[-60:])
def test_the_configs_found_are_exact_or_refused(path: Path, tmp_path: Path) -> None:
    config = json.loads(path.read_text())
    refused = {key for key in CONFIG_REFUSED if config.get(key)}
    if str(config.get("init_lora_weights")).startswith("pissa"):
        refused.add("init_lora_weights")
    (tmp_path / "adapter_config.json").write_text(path.read_text())
    if refused:
        save_tensors(tiny().tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(LorakitError, match=f"adapter_config.json: ({'|'.join(refused)}) "):
            load_adapter(str(tmp_path))
        return
    modules = config["target_modules"] or []
    if not {"lin0", "conv2d", "to_q"} & set(modules):
        check_config_is_exact(config, tmp_path)
        return
    save_tensors(tiny().tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        LorakitError, match=r"rank|not targeted by the config|has no lora_magnitude"
    ):
        load_adapter(str(tmp_path))


def check_config_is_exact(config: dict[str, Any], folder: Path) -> None:
    """Let PEFT build the adapter from the config; then only the tensors come from PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys this PEFT does not know, of fan_in_fan_out
        made = peft.LoraConfig.from_pretrained(str(folder))
    made.inference_mode, made.base_model_name_or_path = False, None
    model = with_lora(random_model(_family(config)), made)
    save_tensors(
        {
            name: Tensor.from_array(tensor.detach().numpy())
            for name, tensor in peft.get_peft_model_state_dict(model).items()
        },
        folder / "adapter_model.safetensors",
    )
    check_same_deltas(load_adapter(str(folder), plain=False), model)


@needs_found
@pytest.mark.parametrize("name", ["lora_mlp-0.6.1", "lora_mlp_modules_to_save-0.6.1"])
def test_the_line_that_converts_a_pickle_does(name: str, tmp_path: Path) -> None:
    source = FOUND / "peft-regression" / name
    for file in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    with pytest.raises(LorakitError) as caught:
        load_adapter(str(tmp_path))
    done = shell(str(caught.value).partition("; run: ")[2], tmp_path)
    assert done.stderr == f"Note: wrote {tmp_path}/\n"
    assert done.returncode == 0
    adapter = load_adapter(str(tmp_path), plain=False)
    saved = torch.load(tmp_path / "adapter_model.bin", map_location="cpu", weights_only=True)
    assert [module.name for module in adapter.modules()] == ["lin0"]
    a, b = (saved[lora_name("lin0", factor)] for factor in ("A", "B"))
    assert np.allclose(adapter.modules()[0].delta(), (b @ a).numpy(), atol=1e-6)
    for weight, tensor in adapter.whole.items():
        assert np.array_equal(tensor.array(), saved[f"base_model.model.{weight}"].numpy())
    assert list(adapter.whole) == (["lin1.bias", "lin1.weight"] if "to_save" in name else [])
