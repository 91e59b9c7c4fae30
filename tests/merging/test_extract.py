"""Adapters extracted from the difference of two models: against the dense SVD, and back."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from lorakit.adapters.storage import load_adapter
from lorakit.cli import lorakit
from tests.support.peft_models import logits, random_model, with_lora

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def save_models(folder: Path, family: str = "llama", *, rank: int = 4, shard: str = "1GB") -> Any:
    """Save a base and one with LoRA of a rank merged into it; return PEFT's model."""
    base = random_model(family)
    base.save_pretrained(folder / "base", max_shard_size=shard)
    config = {"r": rank, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
    model = with_lora(copy.deepcopy(base), config)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(folder / "tuned")
    return model


def run(folder: Path, *options: str) -> Result:
    output = folder / "out.safetensors"
    models = ["--base", str(folder / "base"), "--tuned", str(folder / "tuned")]
    return CliRunner().invoke(lorakit, ["extract", *models, *options, "-o", str(output)])


def differences(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return W_tuned - W_base of all tensors, in float64."""
    base, tuned = (load_file(folder / name / "model.safetensors") for name in ("base", "tuned"))
    return {key: (tuned[key].double() - base[key].double()).numpy() for key in base}


@pytest.mark.parametrize("family", TARGETS)
def test_lora_that_was_merged_is_extracted_and_gives_its_logits(
    family: str, tmp_path: Path
) -> None:
    model = save_models(tmp_path, family)
    done = run(tmp_path, "--rank", "4")
    assert done.exit_code == 0, done.stderr
    adapter = load_adapter(str(tmp_path / "out.safetensors"))
    assert len(adapter.modules()) == 3 * len(TARGETS[family])
    assert (
        CliRunner()
        .invoke(lorakit, ["convert", str(tmp_path / "out.safetensors"), "-o", f"{tmp_path}/peft/"])
        .exit_code
        == 0
    )
    again = peft.PeftModel.from_pretrained(random_model(family), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_lower_rank_is_the_dense_truncated_svd(rank: int, tmp_path: Path) -> None:
    save_models(tmp_path)
    done = run(tmp_path, "--rank", str(rank))
    dense = differences(tmp_path)
    sizes: dict[int | None, list[tuple[float, float]]] = {}
    for module in load_adapter(str(tmp_path / "out.safetensors")).modules():
        u, values, vt = np.linalg.svd(dense[f"{module.name}.weight"], full_matrices=False)
        best = (u[:, :rank] * values[:rank]) @ vt[:rank]
        np.testing.assert_allclose(module.delta(), best, atol=1e-4)
        lost = float(np.sum(values[rank:] ** 2))
        sizes.setdefault(module.layer, []).append((lost, float(np.sum(values**2))))
    for layer, of_layer in sizes.items():
        lost, whole = map(sum, zip(*of_layer, strict=True))
        line = next(line for line in done.stderr.splitlines() if f"layer {layer}: " in line)
        assert f"rank {rank}," in line
        assert float(line.rpartition("error ")[2]) == pytest.approx(np.sqrt(lost / whole), rel=0.06)


@pytest.mark.parametrize(("energy", "most"), [("0.5", None), ("0.95", None), ("0.95", 2)])
def test_each_module_gets_the_lowest_rank_that_keeps_the_energy(
    energy: str, most: int | None, tmp_path: Path
) -> None:
    save_models(tmp_path)
    bound: Sequence[str] = () if most is None else ("--max-rank", str(most))
    run(tmp_path, "--keep-energy", energy, *bound)
    dense = differences(tmp_path)
    for module in load_adapter(str(tmp_path / "out.safetensors")).modules():
        squares = np.linalg.svd(dense[f"{module.name}.weight"], compute_uv=False) ** 2
        needed = 1 + int(np.searchsorted(np.cumsum(squares), float(energy) * squares.sum()))
        assert module.rank == min(needed, most or needed)


def test_the_whole_energy_of_a_full_difference_takes_the_full_rank(tmp_path: Path) -> None:
    save_models(tmp_path)
    draw = torch.Generator().manual_seed(3)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    key = "model.layers.1.self_attn.q_proj.weight"
    changed = {**weights, key: weights[key] + torch.randn(32, 32, generator=draw)}
    save_file(changed, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    assert run(tmp_path, "--keep-energy", "1").exit_code == 0
    (module,) = load_adapter(str(tmp_path / "out.safetensors")).modules()
    assert (module.name, module.rank) == (key.removesuffix(".weight"), 32)
    np.testing.assert_allclose(module.delta(), (changed[key] - weights[key]).numpy(), atol=1e-4)


def test_only_the_asked_modules_and_layers_are_taken(tmp_path: Path) -> None:
    save_models(tmp_path)
    done = run(tmp_path, "--rank", "4", "--target-modules", "q_proj,v_proj", "--layers", "0-1")
    modules = [m.name for m in load_adapter(str(tmp_path / "out.safetensors")).modules()]
    assert modules == [
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    ]
    assert "5 other tensors differ" in done.stderr


def test_a_sharded_base_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for shard in ("1GB", "10KB"):
        folder = tmp_path / shard
        save_models(folder, shard=shard)
        assert run(folder, "--rank", "2").exit_code == 0
        content = (folder / "out.safetensors").read_bytes()
        written.append(content.replace(str(folder).encode(), b"FOLDER"))
    tensors = [content[-1000:] for content in written]
    assert tensors[0] == tensors[1]


def _grow_vocabulary(folder: Path) -> None:
    model = random_model("llama")
    model.resize_token_embeddings(60)
    model.save_pretrained(folder / "tuned")


def _other_family(folder: Path) -> None:
    random_model("gpt2").save_pretrained(folder / "tuned")
    (folder / "tuned" / "config.json").write_text((folder / "base" / "config.json").read_text())


def _same(folder: Path) -> None:
    random_model("llama").save_pretrained(folder / "tuned")


def _not_finite(folder: Path) -> None:
    path = folder / "tuned" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, {"format": "pt"})


def _quantised(folder: Path) -> None:
    path = folder / "tuned" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "quantization_config": {"quant_method": "awq"}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_grow_vocabulary, "LoRA cannot hold added tokens"),
        (_other_family, "give two models of one architecture"),
        (_same, "does not differ"),
        (_not_finite, "q_proj.weight holds values that are not finite"),
        (_quantised, "is quantised (awq)"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    save_models(tmp_path)
    change(tmp_path)
    done = run(tmp_path, "--rank", "2")
    assert done.exit_code == 1
    assert message in str(done.exception)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "options", [[], ["--rank", "2", "--keep-energy", "0.5"], ["--rank", "2", "--max-rank", "3"]]
)
def test_rank_and_energy_exclude_each_other(options: list[str], tmp_path: Path) -> None:
    assert run(tmp_path, *options).exit_code == 2


def test_the_history_says_what_was_extracted_from_what(tmp_path: Path) -> None:
    save_models(tmp_path)
    run(tmp_path, "--rank", "2", "--target-modules", "q_proj")
    header = load_adapter(str(tmp_path / "out.safetensors")).header
    (entry,) = header["history"]
    assert entry["settings"] == {"rank": 2, "target_modules": ["q_proj"]}
    assert len(entry["parents"]["tuned"]) == 64
    assert header["base"]["name"] == str(tmp_path / "base")
