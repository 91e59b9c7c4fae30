"""A model folder of which a part is missing or damaged: one line that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.in_process import run_here
from tests.support.models import FAMILIES, byte_tokenizer
from tests.support.training_data import rows, save_rows

DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda shard: shard.write_bytes(b""),
    "cut short": lambda shard: shard.write_bytes(shard.read_bytes()[:-100]),
    "overwritten": lambda shard: shard.write_bytes(b"\xff" * 1000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_cannot_be_read_is_named(damage: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    base.save_pretrained(model, max_shard_size="30KB")
    byte_tokenizer().save_pretrained(model)
    data = save_rows(tmp_path / "data.jsonl", rows(1))
    arguments = ("generate", "--model", str(model), "--data", data, "--max-new-tokens", "1")
    assert run_here(*arguments).code == 0
    index = json.loads((model / "model.safetensors.index.json").read_text("utf-8"))
    shard = model / sorted(set(index["weight_map"].values()))[1]
    DAMAGES[damage](shard)
    ended = run_here(*arguments)
    assert ended.code == 1
    (line,) = ended.errors
    assert str(shard) in line


Fields = dict[str, Any]
# What is wrong in which file beside the weights, and what the error says.
SETTINGS: dict[str, tuple[str, Callable[[Fields], object], str]] = {
    "a generation config that is no object": (
        *("generation_config.json", lambda fields: 0, "cannot load the generation config of"),
    ),
    "an end token that is no number": (
        "generation_config.json",
        lambda fields: {**fields, "eos_token_id": {}},
        "names an end token that is no number; mend eos_token_id",
    ),
    "a tokenizer of a strange version": (
        *("tokenizer.json", lambda fields: {**fields, "version": 0}, "cannot load the tokenizer"),
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_what_lies_beside_the_weights_is_refused_in_one_line(
    case: str, llama: str, tmp_path: Path
) -> None:
    file, changed, reason = SETTINGS[case]
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    (model / file).write_text(json.dumps(changed(json.loads((model / file).read_text("utf-8")))))
    ended = run_here("show", save_rows(tmp_path / "data.jsonl", rows(1)), "--model", str(model))
    assert ended.code == 1
    (line,) = ended.errors
    assert reason in line


def test_a_tokenizer_s_own_limit_is_not_read(llama: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    path = model / "tokenizer_config.json"
    fields = {**json.loads(path.read_text("utf-8")), "model_max_length": "none"}
    path.write_text(json.dumps(fields), "utf-8")
    data = save_rows(tmp_path / "data.jsonl", rows(1))
    assert run_here("show", data, "--model", str(model)).code == 0
