"""A weight for each adapter and module, learned with the adapters frozen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.card import card_text, command_line
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.merging.joint import prepare
from lorakit.merging.learned_weights import (
    by_block,
    merge_with_learned_weights,
    weight_trainer,
)
from lorakit.models.batches import epoch_batches
from lorakit.models.lora import attach, factors
from lorakit.settings import LEARNED_WEIGHTS_LR, LoraSettings, SelectionSettings, TrainingSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.train import train_adapter
from tests.support.adapters import tiny
from tests.support.in_process import run_here
from tests.support.models import open_base, save_model
from tests.support.program import run_over
from tests.support.training_data import Recorder, rows, save_rows

SETTINGS = TrainingSettings(
    lr=5e-2, epochs=3, batch_size=6, dropout=0.0, device="cpu", dtype="float32"
)
SHAPES = {
    "xs": LoraSettings(rank=4, alpha=8),
    "wl": LoraSettings(rank=2, alpha=6, target_modules=("q_proj", "up_proj"), layers=(0, 2)),
    "tgt": LoraSettings(rank=3, alpha=3, layers=(1,)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows(20))


@pytest.fixture(scope="module")
def files(llama: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three trained adapters that differ in rank, alpha, target modules and layers."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, shape in SHAPES.items():
        train_adapter(
            open_base(llama),
            data,
            None,
            settings=replace(SETTINGS, epochs=2),
            lora=shape,
            output=str(folder / f"{name}.safetensors"),
            reporter=Recorder(),
        )
    return [str(folder / f"{name}.safetensors") for name in SHAPES]


@pytest.fixture(scope="module")
def adapters(files: list[str]) -> list[Adapter]:
    return [load_adapter(file) for file in files]


def merge(
    model: str,
    adapters: list[Adapter],
    data: str,
    output: Path,
    *,
    reporter: Recorder | None = None,
    resume: bool = False,
    portable: bool = False,
    **changes: Any,
) -> Adapter:
    merge_with_learned_weights(
        adapters,
        open_base(model),
        data,
        None,
        settings=replace(SETTINGS, **changes),
        output=str(output),
        reporter=reporter or Recorder(),
        resume=resume,
        portable=portable,
    )
    return load_adapter(str(output))


def weights_of(merged: Adapter) -> dict[str, dict[str, float]]:
    return merged.header["history"][-1]["weights"]


def weighted_sum(adapters: list[Adapter], weights: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return Σ w_im·ΔW_im by module, dense."""
    total: dict[str, Any] = {}
    for adapter, by_module in zip(adapters, (weights[n] for n in SHAPES), strict=True):
        for module in adapter.modules():
            change = by_module[module.name] * module.delta()
            total[module.name] = total.get(module.name, 0) + change
    return total


def test_training_equals_dense_sums_whose_weights_alone_are_trained(
    llama: str, data: str, adapters: list[Adapter]
) -> None:
    """12 AdamW steps on W0 + Σ w_im·ΔW_im, one example at a time, without lorakit's layers."""
    settings = replace(SETTINGS, schedule="constant", warmup=0.0, max_grad_norm=1e9)
    merge = prepare(
        adapters,
        open_base(llama),
        data,
        data,
        settings=settings,
        selection=SelectionSettings(),
        reporter=Recorder(),
    )
    trainer = weight_trainer(merge, Recorder())
    batches = [b for n in range(3) for b in epoch_batches(merge.corpus.train, 6, 0, n)]
    ours = [trainer._step(batch, len(batches)).train_loss for batch in batches]

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.requires_grad_(False)
    changes = [
        {m.name: torch.tensor(m.delta(), dtype=torch.float32) for m in adapter.modules()}
        for adapter in adapters
    ]
    scalars = [
        {name: torch.full((), 1 / 3, requires_grad=True) for name in change} for change in changes
    ]
    frozen = {f"{name}.weight": model.get_submodule(name).weight for c in changes for name in c}

    def loss_of(example: Any) -> torch.Tensor:
        dense = dict(frozen)
        for change, weights in zip(changes, scalars, strict=True):
            for name in change:
                key = f"{name}.weight"
                dense[key] = dense[key] + weights[name] * change[name]
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.start] = -100
        output: Any = torch.func.functional_call(
            model, dense, kwargs={"input_ids": ids, "labels": labels}
        )
        loss: torch.Tensor = output.loss * example.targets
        return loss

    parameters = [weight for weights in scalars for weight in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    theirs = []
    for batch in batches:
        loss = sum((loss_of(e) for e in batch), torch.zeros(())) / sum(e.targets for e in batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(float(loss.detach()))

    assert len(batches) == 12
    assert ours == pytest.approx(theirs, abs=1e-5)
    learned = by_block(merge.stacked, trainer.weights())
    for weights, by_module in zip(scalars, learned.values(), strict=True):
        assert by_module.keys() == weights.keys()
        for name, weight in weights.items():
            assert by_module[name] == pytest.approx(float(weight.detach()), abs=2e-4)
    moved = [abs(value - 1 / 3) for by_module in learned.values() for value in by_module.values()]
    assert min(moved) > 1e-3, "every weight must have moved for this to mean anything"


def test_the_adapter_is_the_weighted_sum_that_its_history_and_its_blocks_tell(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    merged = merge(llama, adapters, data, tmp_path / "m.safetensors")
    weights = weights_of(merged)
    assert weights.keys() == SHAPES.keys()
    expected = weighted_sum(adapters, weights)
    assert {m.name for m in merged.modules()} == expected.keys()
    for module in merged.modules():
        assert module.scale == 1.0
        np.testing.assert_allclose(module.delta(), expected[module.name], rtol=0, atol=1e-6)
    for block, source in zip(merged.header["blocks"], adapters, strict=True):
        for module in source.modules():
            part = block["modules"][module.name]
            expected_scale = weights[block["name"]][module.name] * module.scale
            assert part["scale"] == pytest.approx(expected_scale, rel=1e-12)
            pair = next(m for m in merged.modules() if m.name == module.name)
            span = slice(part["offset"], part["offset"] + part["rank"])
            np.testing.assert_array_equal(pair.a[span], module.a)


def test_the_weights_begin_at_equal_shares_and_lower_the_loss(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    watcher = Recorder()
    still = merge(llama, adapters, data, tmp_path / "still", lr=1e-30, epochs=1)
    assert {w for by_module in weights_of(still).values() for w in by_module.values()} == {
        float(np.float32(1 / 3))
    }
    merge(llama, adapters, data, tmp_path / "m", reporter=watcher, epochs=4)
    losses = [entry["validation_loss"] for entry in watcher.epochs]
    assert min(losses[1:]) < losses[0]


def test_one_adapter_of_weight_1_that_learns_nothing_is_itself(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    merged = merge(llama, adapters[:1], data, tmp_path / "m", lr=1e-30, epochs=1)
    for module, source in zip(merged.modules(), adapters[0].modules(), strict=True):
        np.testing.assert_array_equal(module.delta(), source.delta())


def test_nothing_but_the_weights_is_trained(llama: str, data: str, adapters: list[Adapter]) -> None:
    merge = prepare(
        adapters,
        open_base(llama),
        data,
        None,
        settings=SETTINGS,
        selection=SelectionSettings(),
        reporter=Recorder(),
    )
    trainer = weight_trainer(merge, Recorder())
    assert sum(parameter.numel() for parameter in trainer.parameters) == 6 + 4 + 2
    trainable = {id(p) for p in merge.base.model.parameters() if p.requires_grad}
    assert trainable == {id(parameter) for parameter in trainer.parameters}
    list(trainer.train(merge.corpus.train, merge.corpus.validation, Recorder()))
    for name, (a, b) in merge.stacked.factors.items():
        for factor, loaded in zip(factors(merge.layers[name]), (a, b), strict=True):
            np.testing.assert_array_equal(factor.detach().numpy(), loaded)


@pytest.mark.parametrize("select_by", ["loss", "rougeL"])
def test_a_resumed_merge_gives_the_bytes_of_an_unbroken_one(
    llama: str,
    data: str,
    adapters: list[Adapter],
    tmp_path: Path,
    select_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_merge(name: str, *, resume: bool = False) -> None:
        merge_with_learned_weights(
            adapters,
            open_base(llama),
            data,
            None,
            settings=replace(SETTINGS, dropout=0.1),
            selection=SelectionSettings(select_by=select_by, max_new_tokens=4),
            output=str(tmp_path / name),
            reporter=Recorder(),
            resume=resume,
        )

    run_merge("whole.safetensors")
    save = Checkpoint.save

    def stop(self: Checkpoint, trainer: Any) -> None:
        save(self, trainer)
        if trainer.progress.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_merge("broken.safetensors")
    run_merge("broken.safetensors", resume=True)
    whole, broken = (tmp_path / f"{name}.safetensors" for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
    assert len(set(weights_of(load_adapter(str(whole)))["xs"].values())) > 1


def test_the_log_shows_every_weight_before_every_epoch_and_the_best_at_the_end(
    llama: str, data: str, files: list[str], tmp_path: Path
) -> None:
    done = run_here(
        *("merge", *files, "--data", data, "--model", llama, "--method", "learned-weights"),
        *("--epochs", "2", "--log", "log.jsonl", "-o", "m.safetensors"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.stderr
    assert done.stderr.count("weights: xs 0.") == 3
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    told = [entry for entry in log if "weights" in entry]
    assert [entry["step"] for entry in told] == [2, 4]
    assert {len(by_module) for by_module in told[0]["weights"].values()} == {6, 4, 2}
    merged = load_adapter(str(tmp_path / "m.safetensors"))
    assert log[-1]["best_weights"] == weights_of(merged)
    assert merged.header["history"][-1]["settings"]["lr"] == LEARNED_WEIGHTS_LR


def test_inspect_and_the_card_sum_the_weights_up(
    llama: str, data: str, files: list[str], tmp_path: Path
) -> None:
    line = ["merge", *files, "--data", data, "--model", llama, "--method", "learned-weights"]
    done = run_here(*line, "--epochs", "1", "--lr", "0.05", "-o", "out/", cwd=tmp_path)
    assert done.code == 0, done.stderr
    table = run_here("inspect", "out", "--format", "table", cwd=tmp_path).text
    merged = load_adapter(str(tmp_path / "out"))
    weights = weights_of(merged)
    low, high = min(weights["xs"].values()), max(weights["xs"].values())
    (shown,) = (text for text in table.splitlines() if text.startswith("   weights: "))
    assert f"xs {sum(weights['xs'].values()) / 6:.3g} ({low:.3g} to {high:.3g})" in shown
    assert f"{2 * low:.6g} to {2 * high:.6g}" in table  # the block's scales, s·w
    assert f"- {shown.strip()}\n" in card_text(merged)
    entry = merged.header["history"][-1]
    assert "--weights" not in command_line(entry)
    assert "--method learned-weights" in command_line(entry)
    assert entry["settings"]["lr"] == 0.05


@pytest.mark.parametrize("weights", [[1], {"xs": 1}, {"xs": {"q": "x"}}, {}])
def test_foreign_weights_in_a_history_are_shown_as_they_are(weights: Any, tmp_path: Path) -> None:
    adapter = tiny()
    header: Any = {"history": [{"command": "merge", "weights": weights}]}
    save_adapter(Adapter(adapter.tensors, adapter.config, header), str(tmp_path / "a/"))
    shown = run_here("inspect", "a", "--format", "table", cwd=tmp_path)
    assert shown.code == 0, shown.stderr
    assert "   weights: " in shown.text


def test_a_portable_merge_is_the_same_sum_at_one_rank(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    plain = merge(llama, adapters, data, tmp_path / "plain", epochs=1)
    portable = merge(llama, adapters, data, tmp_path / "portable", epochs=1, portable=True)
    assert weights_of(plain) == weights_of(portable)
    assert len({module.rank for module in portable.modules()}) == 1
    for module, other in zip(plain.modules(), portable.modules(), strict=True):
        np.testing.assert_array_equal(module.delta(), other.delta())


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_other_families_are_merged_and_compute_what_was_trained(
    family: str, data: str, tmp_path: Path
) -> None:
    """GPT-2's projections are transposed (Conv1D); the written adapter gives the trained logits."""
    model = save_model(tmp_path / "model", family)
    sources = []
    for seed in (0, 1):
        train_adapter(
            open_base(model),
            data,
            None,
            settings=replace(SETTINGS, epochs=1, seed=seed),
            lora=LoraSettings(rank=2 + seed),
            output=str(tmp_path / f"{seed}.safetensors"),
            reporter=Recorder(),
        )
        sources.append(load_adapter(str(tmp_path / f"{seed}.safetensors")))
    base = open_base(model)
    prepared = prepare(
        sources,
        base,
        data,
        None,
        settings=replace(SETTINGS, epochs=1),
        selection=SelectionSettings(),
        reporter=Recorder(),
    )
    trainer = weight_trainer(prepared, Recorder())
    list(trainer.train(prepared.corpus.train, prepared.corpus.validation, Recorder()))
    ids = torch.tensor([[1, 5, 9, 40, 77, 12, 3]])
    with torch.no_grad():
        trained_logits = base.model(input_ids=ids).logits
    merged = merge(model, sources, data, tmp_path / "m.safetensors", epochs=1)
    again = open_base(model)
    attach(again, merged)
    with torch.no_grad():
        torch.testing.assert_close(
            again.model(input_ids=ids).logits, trained_logits, atol=2e-5, rtol=0
        )


@pytest.mark.slow
def test_two_processes_learn_the_weights_of_one(
    llama: str, data: str, files: list[str], tmp_path: Path
) -> None:
    command = [
        *("merge", *files, "--model", llama, "--data", data, "--method", "learned-weights"),
        *("--epochs", "2", "--dropout", "0", "--batch-size", "6", "--micro-batch-tokens", "60"),
        *("--dtype", "float32", "--device", "cpu"),
    ]
    learned = []
    for processes in (1, 2):
        output = str(tmp_path / f"{processes}.safetensors")
        done = run_over(processes, *command, "-o", output)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("best weights: ") == 1
        by_module = weights_of(load_adapter(output)).values()
        learned.append([weight for weights in by_module for weight in weights.values()])
    assert learned[0] == learned[1]
