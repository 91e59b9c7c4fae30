"""A base in shards computes what the whole base does, and no process holds more than its part."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from lorakit.adapters.storage import load_adapter
from lorakit.cli import load_command
from tests.support.program import run_over, run_script_over
from tests.support.training_data import rows, save_rows

# Prints, for each process, what it holds of a base in shards, and how far its logits are off.
_HOLDINGS = """
    import json, sys
    import torch
    from torch.distributed.tensor import DTensor
    from lorakit.models.lora import factors, inject, pick_modules
    from lorakit.models.loading import load_base
    from lorakit.models.sharing import new_accelerator

    dtype = getattr(torch, sys.argv[2])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        whole = load_base(sys.argv[1], device=torch.device("cpu"), dtype=dtype)
        expected = whole.model(ids).logits
        new_accelerator("cpu")
        base = load_base(sys.argv[1], device=torch.device("cpu"), dtype=dtype, shard=True)
        weights = list(base.model.parameters())
        before = base.model(ids).logits
        layers = inject(base, dict.fromkeys(pick_modules(base, ["q_proj", "v_proj"], None), 4))
        logits = base.model(ids).logits
        lora = [weight for layer in layers.values() for weight in factors(layer)]
        held = [weight for weight in base.model.parameters() if isinstance(weight, DTensor)]
    print(json.dumps({
        "processes": torch.distributed.get_world_size(),
        "whole": sum(weight.nbytes for weight in whole.model.parameters()),
        "own": sum(weight.to_local().nbytes for weight in weights),
        "own after a pass": sum(weight.to_local().nbytes for weight in held),
        "sharded lora": sum(isinstance(weight, DTensor) for weight in lora),
        "lora": [list(weight.shape) for weight in lora[:2]],
        "off": max(float((found - expected).abs().max()) for found in (before, logits)),
        "packs": [whole.packs, base.packs],
    }) + "\\n", end="")
"""


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_each_of_two_processes_holds_half_of_the_base_and_all_of_the_lora(
    llama: str, dtype: str, tmp_path: Path
) -> None:
    script = tmp_path / "holdings.py"
    script.write_text(textwrap.dedent(_HOLDINGS))
    lines = run_script_over(2, script, llama, dtype)
    assert len(lines) == 2
    for process in map(json.loads, lines):
        assert process["processes"] == 2
        assert 0.5 <= process["own"] / process["whole"] < 0.52
        assert process["own after a pass"] == process["own"]
        assert process["sharded lora"] == 0
        assert process["lora"] == [[4, 32], [32, 4]]
        assert process["off"] == 0
        assert process["packs"] == [True, True]


# Micro-batches that do not share out evenly: one process has to run the base without a row.
_TRAINING = (
    *("--epochs", "2", "--lr", "1e-2", "--dropout", "0", "--batch-size", "7"),
    *("--micro-batch-tokens", "60", "--dtype", "float32", "--device", "cpu"),
)
_CASES = {
    "train-adapter": ("train-adapter", "--gradient-checkpointing", "--select-by", "rougeL"),
    "merge": ("merge", "--prune-ratio", "0.3", "--prune-every", "2"),
}


@pytest.mark.parametrize("case", ["train-adapter", pytest.param("merge", marks=pytest.mark.slow)])
def test_what_is_trained_on_a_sharded_base_is_what_is_trained_on_a_whole_one(
    llama: str, case: str, tmp_path: Path
) -> None:
    data = save_rows(tmp_path / "data.jsonl", rows(17, longest=12))
    common = ("--model", llama, "--data", data, *_TRAINING, "--max-new-tokens", "4")
    start = str(tmp_path / "start.safetensors")
    command, *options = _CASES[case]
    if command == "merge":
        assert run_over(1, "train-adapter", *common, "-o", start).returncode == 0
        options = [start, start, *options]
    trained = []
    for name, shard in (("whole", ()), ("sharded", ("--shard",))):
        output = str(tmp_path / f"{name}.safetensors")
        done = run_over(2, command, *options, *common, *shard, "-o", output)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("wrote") == 1
        trained.append(load_adapter(output))
    whole, sharded = (
        np.concatenate([tensor.array().ravel() for tensor in adapter.tensors.values()])
        for adapter in trained
    )
    assert ((whole == 0) == (sharded == 0)).all()
    np.testing.assert_allclose(sharded, whole, atol=1e-5)
    assert trained[0].header == trained[1].header


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        pytest.param([], "1", "--shard needs several processes: torchrun", id="one-process"),
        pytest.param(
            ["--load-in", "4bit"], "2", "--shard and --load-in do not go together", id="quantised"
        ),
    ],
)
def test_sharding_what_cannot_be_sharded_is_a_usage_error(
    options: list[str], processes: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    outcome = CliRunner().invoke(
        load_command("train-adapter"), ["--data", "none.jsonl", "--shard", *options]
    )
    assert outcome.exit_code == click.UsageError.exit_code
    assert message in " ".join(outcome.stderr.split())
