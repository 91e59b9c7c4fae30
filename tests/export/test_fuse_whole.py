"""Whole weights and DoRA fused into a base: against PEFT's own logits and merge_and_unload."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorakit.adapters.storage import load_adapter
from lorakit.errors import LorakitError
from lorakit.export.fuse import fuse
from lorakit.export.model_folder import open_model_folder
from lorakit.reporting import Silent
from lorakit.settings import ModelSettings
from tests.support.peft_models import MORE_KINDS, logits, random_model, with_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def save_both(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, **fields: Any
) -> tuple[Any, Any]:
    """Save a random base and PEFT's adapter on it; return the base and PEFT's model."""
    family, config = MORE_KINDS[kind]
    base = random_model(family).to(dtype)
    base.save_pretrained(folder / "base")
    model = with_lora(copy.deepcopy(base), {**config, **fields})
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return base, model


def fuse_files(folder: Path, dtype: str | None = None) -> Path:
    fuse(
        load_adapter(str(folder / "adapter"), plain=False),
        open_model_folder(ModelSettings(), str(folder / "base")),
        str(folder / "fused"),
        dtype=dtype,
        resume=False,
        reporter=Silent(),
        check=None,
    )
    return folder / "fused"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_a_fused_model_has_the_weights_and_logits_of_pefts(kind: str, tmp_path: Path) -> None:
    base, model = save_both(kind, tmp_path)
    folder = fuse_files(tmp_path)
    expected = logits(model)
    fused = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not torch.allclose(logits(base), expected, atol=1e-2)
    torch.testing.assert_close(logits(fused), expected, atol=1e-4, rtol=1e-4)
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs = stored(tmp_path / "theirs")
    assert stored(folder).keys() == theirs.keys()
    for key, tensor in stored(folder).items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["DoRA and a head", "DoRA on Conv1D"])
def test_a_bfloat16_base_is_rounded_once_from_the_sum_in_float32(kind: str, tmp_path: Path) -> None:
    base, model = save_both(kind, tmp_path, torch.bfloat16)
    fused = stored(fuse_files(tmp_path))
    exact = model.float().merge_and_unload()
    weights = exact.state_dict()
    for key, tensor in fused.items():
        name = key if key in weights else f"transformer.{key}"
        assert tensor.dtype == torch.bfloat16
        error = (tensor.float() - weights[name]).abs()
        assert bool((error <= weights[name].abs() * 2.0**-8 * 1.001 + 1e-6).all())
    assert set(base.state_dict()) >= {k if k in weights else f"transformer.{k}" for k in fused}


def test_blocks_of_rows_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_both("DoRA on Conv1D", tmp_path)
    whole = stored(fuse_files(tmp_path))
    shutil.rmtree(tmp_path / "fused")
    monkeypatch.setattr("lorakit.export.fused._BLOCK", 200)
    for key, tensor in stored(fuse_files(tmp_path)).items():
        torch.testing.assert_close(tensor, whole[key], rtol=1e-6, atol=1e-6)


def test_a_row_of_zeros_has_no_direction_for_dora(tmp_path: Path) -> None:
    save_both("DoRA", tmp_path)
    for path, key in [
        ("base/model.safetensors", "model.layers.1.self_attn.q_proj.weight"),
        (
            "adapter/adapter_model.safetensors",
            "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
        ),
    ]:
        tensors = load_file(tmp_path / path)
        tensors[key][3] = 0
        save_file(tensors, tmp_path / path, {"format": "pt"})
    with pytest.raises(LorakitError, match=r"1.self_attn.q_proj.weight has a row of zeros"):
        fuse_files(tmp_path)


def test_a_resized_vocabulary_is_refused_with_the_way_to_do_it(tmp_path: Path) -> None:
    base = random_model("llama")
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(53, mean_resizing=False)
    model = with_lora(base, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(LorakitError, match=r"53×32, in .*base it is 50×32: .*embeddings\(53\)"):
        fuse_files(tmp_path)
    resized = random_model("llama")
    resized.resize_token_embeddings(53, mean_resizing=False)
    resized.save_pretrained(tmp_path / "base")
    fused = transformers.AutoModelForCausalLM.from_pretrained(fuse_files(tmp_path)).eval()
    torch.testing.assert_close(logits(fused), logits(model), atol=1e-4, rtol=1e-4)


def test_shared_embeddings_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    base = random_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    config = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    with_lora(base, {**config, "modules_to_save": ["wte"]}).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    with pytest.raises(LorakitError, match=r"transformer.wte.weight whole, which .* shares"):
        fuse_files(tmp_path)
    base = random_model("gpt2")
    base.transformer.wte.weight.data += 0.1
    model = with_lora(base, config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert len(load_adapter(str(tmp_path / "adapter"), plain=False).whole) == 2
    fused = transformers.AutoModelForCausalLM.from_pretrained(fuse_files(tmp_path)).eval()
    torch.testing.assert_close(logits(fused), logits(model), atol=1e-4, rtol=1e-4)
