from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter
from lorakit.merging.adaptive import merge_adaptively
from lorakit.merging.importance import measure_importance, unstack
from lorakit.merging.stack import stack
from lorakit.records.record import Record
from lorakit.settings import LoraSettings, PruningSettings, TrainingSettings
from lorakit.training.train import train_adapter
from tests.support.in_process import run_here
from tests.support.models import open_base
from tests.support.training_data import Recorder, rows, save_rows

SETTINGS = TrainingSettings(lr=2e-2, epochs=1, batch_size=4, dropout=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "val.jsonl", rows(10))


@pytest.fixture(scope="module")
def merged(llama: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = tmp_path_factory.mktemp("adapters")
    for name, lora in (
        ("one", LoraSettings(rank=3, alpha=9)),
        ("two", LoraSettings(rank=2, alpha=1, layers=(1,))),
    ):
        train_adapter(
            open_base(llama),
            data,
            None,
            settings=SETTINGS,
            lora=lora,
            output=str(folder / name),
            reporter=Recorder(),
        )
    merge_adaptively(
        [load_adapter(str(folder / name)) for name in ("one", "two")],
        open_base(llama),
        data,
        data,
        settings=SETTINGS,
        pruning=PruningSettings(Decimal("0.1")),
        output=str(folder / "merged"),
        reporter=Recorder(),
    )
    return load_adapter(str(folder / "merged"))


def test_the_mean_is_that_of_weights_times_root_mean_squares_and_the_scale(
    llama: str, data: str, merged: Adapter
) -> None:
    found = measure_importance(open_base(llama), merged, data, settings=SETTINGS)
    assert len(found) == 6 + 2
    base = open_base(llama)
    for module in merged.modules():  # the merged model itself, its ΔW in the weights
        base.model.get_submodule(module.name).weight.data += torch.tensor(module.delta()).float()
    encoder = base.encoder(chat="off")
    scales = {block["name"]: block["modules"] for block in merged.header["blocks"]}
    for row in found:
        read: list[torch.Tensor] = []
        hook = base.model.get_submodule(row["module"]).register_forward_hook(
            lambda module, inputs, output, read=read: read.append(inputs[0][0])
        )
        with torch.no_grad():
            for record in rows(10):
                ids = encoder.example(Record(record, record["id"])).ids[:-1]
                base.model(input_ids=torch.tensor([ids]))
        hook.remove()
        x = torch.cat(read).double().numpy()
        module = next(m for m in merged.modules() if m.name == row["module"])
        part = scales[row["block"]][row["module"]]
        span = slice(part["offset"], part["offset"] + part["rank"])
        a, b = module.a[span], module.b[:, span] / part["scale"]
        of_a = np.abs(a) * np.linalg.norm(x, axis=0)
        of_b = np.abs(b) * np.linalg.norm(x @ a.T, axis=0)
        wanted = part["scale"] * (of_a.sum() + of_b.sum()) / (a.size + b.size) / len(x) ** 0.5
        assert row["importance"] == pytest.approx(wanted, rel=1e-3), row


def test_a_merged_adapter_is_unstacked_to_what_training_had(merged: Adapter) -> None:
    apart = unstack(merged)
    assert [block.name for block in apart.blocks] == ["one", "two"]
    whole = stack([merged])
    for name, (a, b) in whole.factors.items():
        assert np.array_equal(apart.factors[name][0], a)
        np.testing.assert_allclose(apart.factors[name][1] * apart.scales(name), b, rtol=1e-6)


def test_the_command_prints_a_line_a_module_and_draws_them(
    llama: str, data: str, merged: Adapter, tmp_path: Path
) -> None:
    for ending in ("png", "svg"):
        plot = str(tmp_path / f"map.{ending}")
        done = run_here(
            *("inspect", merged.name, "--importance", "--data", data, "--plot", plot),
            *("--model", llama),
        )
        assert done.code == 0, done.stderr
        lines = [json.loads(line) for line in done.text.splitlines()]
        assert Path(f"{plot}.jsonl").read_text() == done.text
        assert {line["block"] for line in lines} == {"one", "two"}
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "map.svg").read_text()


@pytest.mark.parametrize("options", [["--importance"], ["--data", "x"]], ids=lambda o: o[0])
def test_importance_and_data_go_together(merged: Adapter, options: list[str]) -> None:
    done = run_here("inspect", merged.name, *options)
    assert done.code == 2
    assert "--importance needs --data" in done.stderr
