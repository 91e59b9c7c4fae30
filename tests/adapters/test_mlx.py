"""Adapters of MLX, read and written: against MLX's own formula, against PEFT, and MLX itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from numpy.typing import NDArray

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.history import Header
from lorakit.adapters.mlx import find_mlx, save_mlx
from lorakit.adapters.safetensors import read_tensors, write_tensors
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from tests.adapters.test_peft_adapters import FOUND, needs_found
from tests.merging.test_static import new_adapter
from tests.support.peft_models import logits

REAL = (
    "ml-explore__mlx-lm",
    "wyek1n__MLX-CLI",
    "wyek1n__MLX-CLI/0000100_adapters.safetensors",
)


def mlx_changes(folder: Path, file: str = "adapters.safetensors") -> dict[str, NDArray[np.float64]]:
    """Return ΔW by module as MLX computes it: the transposed of s·a·b, dense, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, _ = read_tensors(folder / file, "x")
    changes = {}
    for key in tensors:
        if key.endswith(".lora_a"):
            module = key.removesuffix(".lora_a")
            a, b = (tensors[f"{module}.lora_{x}"].array().astype(np.float64) for x in "ab")
            changes[module] = config["lora_parameters"]["scale"] * (a @ b).T
    return changes


def convert(*arguments: str | Path) -> None:
    done = CliRunner().invoke(lorakit, ["convert", *map(str, arguments)], standalone_mode=False)
    if done.exception:
        raise done.exception


@needs_found
@pytest.mark.parametrize("source", REAL)
def test_a_real_adapter_changes_the_weights_as_mlx_says(source: str, tmp_path: Path) -> None:
    path = FOUND / source
    convert(path, "-o", tmp_path / "peft/")
    adapter = load_adapter(str(tmp_path / "peft"))
    folder, file = (path, "adapters.safetensors") if path.is_dir() else (path.parent, path.name)
    changes = mlx_changes(folder, file)
    assert {module.name for module in adapter.modules()} == changes.keys()
    for module in adapter.modules():
        np.testing.assert_array_equal(module.delta(), changes[module.name])


@needs_found
def test_a_real_adapter_gives_its_logits_through_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = transformers.Qwen2Config(
        vocab_size=50,
        hidden_size=896,
        intermediate_size=8,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    base = transformers.Qwen2ForCausalLM(shape).eval()
    convert(FOUND / "ml-explore__mlx-lm", "-o", tmp_path / "peft/")
    with torch.no_grad():
        plain = logits(base)
        model: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
        adapted = logits(model)
        base = model.unload()
        for name, change in mlx_changes(FOUND / "ml-explore__mlx-lm").items():
            base.get_submodule(name).weight += torch.tensor(change, dtype=torch.float32)
        expected = logits(base)
    assert not torch.allclose(plain, expected, atol=1e-3)
    torch.testing.assert_close(adapted, expected, atol=1e-4, rtol=1e-4)


@needs_found
@pytest.mark.parametrize("source", REAL[:2])
def test_a_real_adapter_converted_back_has_the_same_tensors(source: str, tmp_path: Path) -> None:
    convert(FOUND / source, "-o", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", "--to", "mlx", "-o", tmp_path / "mlx/")
    theirs, _ = read_tensors(FOUND / source / "adapters.safetensors", "x")
    ours, _ = read_tensors(tmp_path / "mlx" / "adapters.safetensors", "x")
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert (tensor.dtype, tensor.shape) == (ours[key].dtype, ours[key].shape)
        assert bytes(tensor.data) == bytes(ours[key].data)
    parameters = json.loads((FOUND / source / "adapter_config.json").read_text())["lora_parameters"]
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == parameters["scale"]
    assert config["lora_parameters"]["rank"] == parameters["rank"]
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]


UNEVEN = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="plain"),
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"layers_to_transform": [1, 2]}, id="layers"),
        pytest.param(UNEVEN, id="several ranks and scales"),
    ],
)
def test_a_folder_for_mlx_has_the_same_change(
    config: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    adapter = new_adapter(dtype=dtype, **config)
    save_mlx(adapter, str(tmp_path))
    changes = mlx_changes(tmp_path)
    assert {module.name for module in adapter.modules()} == changes.keys()
    for module in adapter.modules():
        np.testing.assert_allclose(changes[module.name], module.delta(), atol=1e-6)


def test_an_adapter_of_one_rank_and_scale_comes_back_as_it_was(tmp_path: Path) -> None:
    adapter = new_adapter()
    header = Header(format=1, chat="on", history=[{"command": "x", "versions": {}, "settings": {}}])
    adapter = Adapter(adapter.tensors, adapter.config, header, adapter.name)
    save_adapter(adapter, str(tmp_path / "a.safetensors"))
    convert(tmp_path / "a.safetensors", "--to", "mlx", "-o", tmp_path / "mlx")
    convert(tmp_path / "mlx", "-o", tmp_path / "b.safetensors")
    again = load_adapter(str(tmp_path / "b.safetensors"))
    assert again.header == adapter.header
    assert {k: bytes(t.data) for k, t in again.tensors.items()} == {
        k: bytes(t.data) for k, t in adapter.tensors.items()
    }
    assert [module.scale for module in again.modules()] == [
        module.scale for module in adapter.modules()
    ]


ONES = Tensor.from_array(np.ones((4, 2), np.float32))
CUBE = Tensor.from_array(np.ones((3, 4, 2), np.float32))
CONFIG = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}


def mlx_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> Path:
    q = "model.layers.0.self_attn.q_proj"
    b = Tensor.from_array(np.ones((2, 4), np.float32))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with (folder / "adapters.safetensors").open("wb") as stream:
        write_tensors(tensors or {f"{q}.lora_a": ONES, f"{q}.lora_b": b}, {}, stream)
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ({"lora_parameters": {}}, "no number `scale`"),
        ({"lora_parameters": None}, "no number `scale`"),
        ({"lora_parameters": {"scale": "2"}}, "no number `scale`"),
        ({"lora_parameters": {"scale": 1e39}}, "no number `scale`"),
        ({"lora_parameters": {"scale": 2.0, "dropout": None}}, "no number `dropout`"),
    ],
)
def test_another_kind_of_config_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LorakitError, match=f"adapter_config.json: .*{message}"):
        convert(mlx_folder(tmp_path, {**CONFIG, **config}), "-o", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.embed_tokens.lora_a": ONES}, "LoRA on an embedding"),
        ({"model.layers.0.mlp.lora_a": CUBE}, "3 dimensions"),
        ({"model.layers.0.q_proj.lora_a": ONES}, "has no B"),
        ({"model.layers.0.q_proj.m": ONES}, "is no lora_a or lora_b"),
        ({"model.norm.weight": ONES}, "is no lora_a or lora_b"),
    ],
)
def test_another_kind_of_tensor_is_refused(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LorakitError, match=message):
        convert(mlx_folder(tmp_path, CONFIG, tensors), "-o", tmp_path / "x.safetensors")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    q = "model.layers.0.self_attn.q_proj"
    b = Tensor.from_array(np.full((2, 4), np.nan, np.float32))
    folder = mlx_folder(tmp_path, CONFIG, {f"{q}.lora_a": ONES, f"{q}.lora_b": b})
    with pytest.raises(LorakitError, match="not finite"):
        convert(folder, "-o", tmp_path / "x.safetensors")


def test_only_a_folder_is_written_for_mlx(tmp_path: Path) -> None:
    save_adapter(new_adapter(), str(tmp_path / "a.safetensors"))
    for output in ("x.safetensors", "-"):
        with pytest.raises(LorakitError, match="MLX reads folders"):
            convert(tmp_path / "a.safetensors", "--to", "mlx", "-o", output)


@pytest.mark.parametrize("text", ["", "[", "[1]", "{}", '{"peft_type": "LORA"}', "\xff"])
def test_what_has_no_config_of_mlx_is_not_mlx(text: str, tmp_path: Path) -> None:
    mlx_folder(tmp_path, CONFIG)
    assert find_mlx(str(tmp_path)) == tmp_path / "adapters.safetensors"
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    assert find_mlx(str(tmp_path)) is None


def test_other_commands_name_the_line_that_converts_it(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="run lorakit convert"):
        load_adapter(str(mlx_folder(tmp_path, CONFIG)))
