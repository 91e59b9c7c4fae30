"""DoRA adapters as plain LoRA: against PEFT's own W' - W0 and its dense SVD."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from tests.support.peft_models import MORE_KINDS, random_model, with_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
KINDS = [kind for kind in MORE_KINDS if kind.startswith("DoRA")]


def save_both(kind: str, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Save a random base and PEFT's DoRA on it; return PEFT's W' - W0 by module, in float64."""
    family, config = MORE_KINDS[kind]
    base = random_model(family)
    base.save_pretrained(folder / "base")
    model = with_lora(copy.deepcopy(base), config)
    model.save_pretrained(folder / "dora", save_embedding_layers=False)
    fused = model.merge_and_unload()
    return {
        module.name: difference(base, fused, module.name)
        for module in load_adapter(str(folder / "dora"), plain=False).modules()
    }


def difference(base: Any, fused: Any, name: str) -> np.ndarray[Any, Any]:
    before, after = (model.get_submodule(name).weight.detach().double() for model in (base, fused))
    values: np.ndarray[Any, Any] = (after - before).numpy()
    return values.T if type(base.get_submodule(name)).__name__ == "Conv1D" else values


def merge(folder: Path, *arguments: str) -> Result:
    line = ["merge", f"{folder}/dora", "-o", f"{folder}/out/", *arguments]
    return CliRunner().invoke(lorakit, line)


def with_base(folder: Path) -> tuple[str, ...]:
    return ("--approximate", "dora", "--model", f"{folder}/base")


@pytest.mark.parametrize("kind", KINDS)
def test_at_full_rank_the_merge_is_pefts_change(kind: str, tmp_path: Path) -> None:
    changes = save_both(kind, tmp_path)
    assert merge(tmp_path, "--rank", "32", *with_base(tmp_path)).exit_code == 0
    adapter = load_adapter(str(tmp_path / "out"), plain=False)
    assert not adapter.is_dora
    for module in adapter.modules():
        assert np.allclose(module.delta(), changes[module.name], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_adapters_rank_it_is_the_best_fit_and_the_error_is_told(
    kind: str, tmp_path: Path
) -> None:
    changes = save_both(kind, tmp_path)
    done = merge(tmp_path, "--method", "cat", *with_base(tmp_path))
    assert done.exit_code == 0
    adapter = load_adapter(str(tmp_path / "out"), plain=False)
    before = load_adapter(str(tmp_path / "dora"), plain=False)
    assert [m.rank for m in adapter.modules()] == [m.rank for m in before.modules()]
    assert adapter.whole.keys() == before.whole.keys()
    told = re.findall(r"dora without DoRA, layer (\d+): rank .*, error ([0-9.]+)", done.stderr)
    assert len(told) == 3
    for layer, error in told:
        assert float(error) == pytest.approx(best_error(adapter, changes, int(layer)), rel=0.02)


def best_error(adapter: Adapter, changes: dict[str, Any], layer: int) -> float:
    """Return the error of the best fits of a layer's changes, of the ranks that the adapter has."""
    modules = [module for module in adapter.modules() if module.layer == layer]
    values = [np.linalg.svd(changes[m.name], compute_uv=False) ** 2 for m in modules]
    lost = sum(v[m.rank :].sum() for v, m in zip(values, modules, strict=True))
    return float(np.sqrt(lost / sum(v.sum() for v in values)))


def test_the_history_names_the_adapter_of_dora(tmp_path: Path) -> None:
    save_both("DoRA", tmp_path)
    merge(tmp_path, "--method", "cat", *with_base(tmp_path))
    first, _ = load_adapter(str(tmp_path / "out")).header["history"]
    assert first["settings"] == {"approximate": "dora"}
    sha256 = load_adapter(str(tmp_path / "dora"), plain=False).sha256
    assert first["parents"] == {"dora": sha256}


def test_plain_adapters_are_left_as_they_are(tmp_path: Path) -> None:
    base = random_model("llama")
    base.save_pretrained(tmp_path / "base")
    with_lora(base, {"target_modules": ["q_proj"]}).save_pretrained(tmp_path / "dora")
    merge(tmp_path, "--method", "cat")
    bare = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    merge(tmp_path, "--method", "cat", *with_base(tmp_path))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == bare


def test_without_it_and_for_another_base_the_line_says_what_to_do(tmp_path: Path) -> None:
    save_both("DoRA", tmp_path)
    without = merge(tmp_path, "--rank", "4").exception
    assert isinstance(without, LorakitError)
    assert "by --approximate dora" in str(without)
    other = random_model("gpt2")
    other.save_pretrained(tmp_path / "base")
    wrong = merge(tmp_path, "--rank", "4", *with_base(tmp_path)).exception
    assert isinstance(wrong, LorakitError)
    assert "has no module model.layers.0.self_attn.q_proj" in str(wrong)
    alone = merge(tmp_path, "--rank", "4", "--model", "tiny")
    assert alone.exit_code == 2
