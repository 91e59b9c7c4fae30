from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.adapters.storage import load_adapter
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.batches import completion_logits, lay_out, micro_batches
from lorakit.models.lora import factors, inject, pick_modules
from lorakit.models.sharing import new_accelerator
from lorakit.records.record import Record
from lorakit.settings import LoraSettings, TrainingSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.loss import BatchLoss
from lorakit.training.schedule import learning_rate_factor
from lorakit.training.step_hook import StepHook
from lorakit.training.train import hold_out, train_adapter
from lorakit.training.trainer import Trainer
from tests.support.models import open_base
from tests.support.program import run_over
from tests.support.training_data import Recorder, rows, save_rows

SETTINGS = TrainingSettings(
    lr=1e-2, epochs=4, batch_size=6, dropout=0.0, device="cpu", dtype="float32"
)


def new_trainer(base: Base, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    layers = inject(base, dict.fromkeys(pick_modules(base, ["q_proj", "v_proj"], None), 4), alpha=8)
    for layer in layers.values():  # a B of zeros would hide the gradient of A
        torch.nn.init.normal_(factors(layer)[1], std=0.1)
    return Trainer(base, layers, replace(SETTINGS, **changes), accelerator=new_accelerator("cpu"))


def examples(base: Base, count: int, seed: int = 0) -> list[Any]:
    encoder = base.encoder(chat="off")
    return [encoder.example(Record(row, f"row {row['id']}")) for row in rows(count, seed)]


def gradients(trainer: Trainer, batch: list[Any]) -> tuple[float, list[torch.Tensor]]:
    loss = float(trainer.losses.backward(batch))
    found = [
        parameter.grad.clone() for parameter in trainer.parameters if parameter.grad is not None
    ]
    trainer.optimizer.zero_grad()
    return loss, found


def test_a_loss_is_the_mean_over_completion_tokens_of_the_whole_batch(llama: str) -> None:
    base = open_base(llama)
    batch = examples(base, 6)
    total, count = 0.0, 0
    for example in batch:  # the plain definition: one row, all logits, the loss where it is due
        ids = torch.tensor([example.ids])
        logits = base.model(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(example.start, len(example.ids)):
            total -= float(logits[place - 1, example.ids[place]].detach())
            count += 1
    loss = float(new_trainer(open_base(llama)).losses.backward(batch))
    base_with_lora = new_trainer(base)
    assert count == sum(example.targets for example in batch)
    for layer in base_with_lora.layers.values():
        torch.nn.init.zeros_(factors(layer)[1])
    assert float(base_with_lora.losses.backward(batch)) == pytest.approx(total / count, rel=1e-5)
    assert loss != pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_micro_batches_give_the_gradient_of_the_whole_batch(llama: str, tokens: int) -> None:
    base = open_base(llama)
    trainer = new_trainer(base)
    batch = examples(base, 8)
    trainer.losses.tokens = 10**9
    loss, whole = gradients(trainer, batch)
    trainer.losses.tokens = tokens
    cut_loss, cut = gradients(trainer, batch)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(llama: str) -> None:
    base = open_base(llama)
    trainer = new_trainer(base)
    batch = examples(base, 4)
    _, plain = gradients(trainer, batch)
    trainer.settings = replace(SETTINGS, gradient_checkpointing=True)
    with trainer._training_mode():
        layer = base.model.model.layers[0]
        assert layer.gradient_checkpointing
        assert layer.training
        _, saved = gradients(trainer, batch)
    for one, other in zip(plain, saved, strict=True):
        torch.testing.assert_close(one, other)
    assert not base.model.model.layers[0].training


def test_rows_align_on_the_right_and_keep_the_models_own_logits(llama: str) -> None:
    base = open_base(llama)
    batch = examples(base, 5)
    layout = lay_out(batch, torch.device("cpu"))
    found = completion_logits(base.model, layout)
    for row, example in enumerate(batch):
        alone = base.model(input_ids=torch.tensor([example.ids])).logits[0]
        due = alone[example.start - 1 : -1]
        torch.testing.assert_close(found[row, -example.targets :], due, rtol=1e-4, atol=1e-5)
        assert layout.labels[row, -example.targets :].tolist() == list(example.ids[example.start :])


def test_micro_batches_hold_every_row_once_within_the_budget(llama: str) -> None:
    batch = examples(open_base(llama), 20)
    runs = micro_batches(batch, 90)
    assert sorted(e.where for run in runs for e in run) == sorted(e.where for e in batch)
    assert all(len(run) == 1 or len(run) * max(len(e.ids) for e in run) <= 90 for run in runs)
    assert len(runs) > 1


@pytest.mark.parametrize(
    ("schedule", "factors_at"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_rise_and_fall_as_stated(schedule: str, factors_at: list[float]) -> None:
    found = [learning_rate_factor(schedule, step, 6, 1 / 3) for step in range(6)]
    assert found == pytest.approx(factors_at)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows(20))


def fit(llama: str, data: str, output: Path, **changes: Any) -> Recorder:
    watcher = Recorder()
    resume = changes.pop("resume", False)
    train_adapter(
        open_base(llama, changes.pop("base_dtype", torch.float32)),
        data,
        changes.pop("val", None),
        settings=replace(SETTINGS, **changes),
        lora=LoraSettings(rank=4, alpha=8),
        output=str(output),
        reporter=watcher,
        resume=resume,
    )
    return watcher


def test_the_epoch_with_the_lowest_validation_loss_is_kept(
    llama: str, data: str, tmp_path: Path
) -> None:
    """A second run that ends at the best epoch must give the tensors the longer run kept.

    The validation answers are none that is learnt: their loss falls while the model learns to
    answer at all, then rises while it learns what to answer.
    """
    val = save_rows(tmp_path / "val", [{**r, "completion": " ZZQ##"} for r in rows(6, seed=1)])
    long = fit(
        llama,
        data,
        tmp_path / "long.safetensors",
        lr=3e-2,
        val=val,
        epochs=6,
        patience=6,
        schedule="constant",
        warmup=0.0,
    )
    losses = [entry["validation_loss"] for entry in long.epochs]
    best = losses.index(min(losses)) + 1
    assert best < 6, "the loss must rise again"
    fit(
        llama,
        data,
        tmp_path / "short.safetensors",
        lr=3e-2,
        val=val,
        epochs=best,
        patience=6,
        schedule="constant",
        warmup=0.0,
    )
    kept, short = (
        load_adapter(str(tmp_path / f"{name}.safetensors")) for name in ("long", "short")
    )
    for name, tensor in kept.tensors.items():
        assert tensor.array().tolist() == short.tensors[name].array().tolist()


def test_training_stops_after_patience_epochs_without_a_lower_loss(
    llama: str, data: str, tmp_path: Path
) -> None:
    watcher = fit(
        llama, data, tmp_path / "a.safetensors", lr=3.0, epochs=30, patience=2, schedule="constant"
    )
    best = max(entry["epoch"] for entry in watcher.epochs if entry["best"])
    assert len(watcher.epochs) == best + 2 < 30


def test_the_last_epoch_is_kept_on_request_and_training_does_not_stop_early(
    llama: str, data: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"lr": 3.0, "epochs": 5, "patience": 1, "schedule": "constant"}
    base = open_base(llama)
    trainer = new_trainer(base, **changes, keep="last")
    some, watcher = examples(base, 12), Recorder()
    list(trainer.train(some, some[:4], watcher))
    losses = [entry["validation_loss"] for entry in watcher.epochs]
    assert len(losses) == 5
    assert losses.index(min(losses)) < 4, "another epoch must be better"
    lowest = [min(losses[:number], default=math.inf) for number in range(5)]
    assert [e["best"] for e in watcher.epochs] == [
        loss < low for loss, low in zip(losses, lowest, strict=True)
    ]
    for name, weights in trainer.weights().items():
        for one, other in zip(weights, trainer.best[name], strict=True):
            assert torch.equal(one, other)
    fit(llama, data, tmp_path / "last.safetensors", **changes, keep="last")
    fit(llama, data, tmp_path / "best.safetensors", **changes)
    last, best = (load_adapter(str(tmp_path / f"{n}.safetensors")) for n in ("last", "best"))
    assert last.sha256 != best.sha256
    settings = last.header["history"][-1]["settings"]
    assert (settings["keep"], settings.get("patience")) == ("last", None)


def test_a_last_epoch_without_a_finite_loss_is_an_error(llama: str) -> None:
    base = open_base(llama)
    trainer = new_trainer(base, epochs=2, keep="last")
    some = examples(base, 6)
    trainer.begin(some, some, Recorder())
    trainer.advance()
    trainer.validate = lambda examples: math.nan  # type: ignore[method-assign]
    trainer.advance()
    with pytest.raises(LorakitError, match="the last epoch had no finite validation loss"):
        trainer.check_best()


def test_the_same_run_gives_the_same_bytes(llama: str, data: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit(llama, data, tmp_path / f"{name}.safetensors", dropout=0.2)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_another_seed_gives_other_bytes(llama: str, data: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        fit(llama, data, tmp_path / f"{seed}.safetensors", seed=seed, epochs=1)
    assert (tmp_path / "0.safetensors").read_bytes() != (tmp_path / "1.safetensors").read_bytes()


def interrupt(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Run a training until the checkpoint of an epoch stands, and no further."""
    from lorakit.training.checkpoint import Checkpoint

    save = Checkpoint.save

    def stop(self: Checkpoint, trainer: Trainer) -> None:
        save(self, trainer)
        if trainer.progress.epoch == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run()


def test_a_fresh_run_leaves_no_checkpoint_of_another(
    llama: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.training.checkpoint import Checkpoint

    output, side = tmp_path / "a.safetensors", tmp_path / "a.safetensors.resume"
    interrupt(lambda: fit(llama, data, output), monkeypatch, 2)
    assert side.exists()

    def stop(self: Checkpoint, trainer: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(llama, data, output)
    assert not side.exists()


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_resumed_run_gives_the_bytes_of_an_unbroken_one(
    llama: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    fit(llama, data, tmp_path / "whole.safetensors", dropout=0.1, keep=keep)
    interrupt(
        lambda: fit(llama, data, tmp_path / "broken.safetensors", dropout=0.1, keep=keep),
        monkeypatch,
        2,
    )
    assert not (tmp_path / "broken.safetensors").exists()
    watcher = fit(llama, data, tmp_path / "broken.safetensors", dropout=0.1, resume=True, keep=keep)
    assert [entry["epoch"] for entry in watcher.epochs] == [3, 4]
    assert (tmp_path / "broken.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()
    assert not (tmp_path / "broken.safetensors.resume").exists()


def test_a_run_with_other_settings_does_not_go_on_from_a_checkpoint(
    llama: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(lambda: fit(llama, data, tmp_path / "a.safetensors"), monkeypatch, 1)
    with pytest.raises(LorakitError, match="other settings"):
        fit(llama, data, tmp_path / "a.safetensors", lr=1e-3, resume=True)


def test_lora_weights_are_float32_over_a_bfloat16_base(
    llama: str, data: str, tmp_path: Path
) -> None:
    base = open_base(llama, torch.bfloat16)
    trainer = new_trainer(base)
    assert {weight.dtype for weight in trainer.parameters} == {torch.float32}
    assert base.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    fit(llama, data, tmp_path / "a.safetensors", base_dtype=torch.bfloat16, epochs=1)
    assert {
        tensor.dtype for tensor in load_adapter(str(tmp_path / "a.safetensors")).tensors.values()
    } == {"F32"}


def test_micro_batches_are_halved_when_memory_does_not_suffice(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_base(llama)
    trainer = new_trainer(base)
    batch = examples(base, 8)
    _, whole = gradients(trainer, batch)
    plain = BatchLoss._loss

    def scarce(self: BatchLoss, part: Any) -> torch.Tensor:
        if len(part) * max(len(row.ids) for row in part) > 100:
            raise torch.OutOfMemoryError("no memory")
        return plain(self, part)

    notes: list[str] = []
    trainer.losses.note = notes.append
    monkeypatch.setattr(BatchLoss, "_loss", scarce)
    _, halved = gradients(trainer, batch)
    assert trainer.losses.tokens <= 100
    assert (
        notes[-1]
        == f"out of memory: micro-batches of {trainer.losses.tokens} tokens, bytes may differ"
    )
    for one, other in zip(whole, halved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    trainer.losses.tokens = 10
    monkeypatch.setattr(
        BatchLoss, "_loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError())
    )
    with pytest.raises(LorakitError, match="--gradient-checkpointing"):
        trainer.losses.backward(batch)


def test_only_lora_is_trained(llama: str) -> None:
    base = open_base(llama)
    trainer = new_trainer(base)
    trainable = {id(p) for p in base.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in trainer.parameters}


def test_a_loss_that_is_not_finite_is_an_error(llama: str, data: str, tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="lower --lr"):
        fit(
            llama,
            data,
            tmp_path / "a.safetensors",
            lr=1e30,
            max_grad_norm=1e30,
            epochs=6,
            patience=9,
        )
    assert not (tmp_path / "a.safetensors").exists()


def test_gradients_without_a_bound_are_never_clipped_and_the_adapter_can_be_read(
    llama: str, data: str, tmp_path: Path
) -> None:
    unbounded, high = tmp_path / "unbounded.safetensors", tmp_path / "high.safetensors"
    fit(llama, data, unbounded, max_grad_norm=math.inf, epochs=1)
    fit(llama, data, high, max_grad_norm=1e30, epochs=1)
    adapter = load_adapter(str(unbounded))
    assert adapter.header["history"][-1]["settings"]["max_grad_norm"] is None
    expected = load_adapter(str(high)).tensors
    for name, tensor in adapter.tensors.items():
        np.testing.assert_array_equal(tensor.array(), expected[name].array())


def test_a_seeded_fifth_is_held_out_and_said_so(llama: str, data: str, tmp_path: Path) -> None:
    records = [Record(row, str(place)) for place, row in enumerate(rows(20))]
    training, validation = hold_out(records, 3)
    assert (len(training), len(validation)) == (16, 4)
    assert {r.where for r in training} | {r.where for r in validation} == {r.where for r in records}
    assert hold_out(records, 3) == (training, validation)
    assert hold_out(records, 4) != (training, validation)
    assert len(hold_out(records[:2], 0)[1]) == 1
    with pytest.raises(LorakitError, match="give --val"):
        hold_out(records[:1], 0)
    assert "4 of 20 records" in fit(llama, data, tmp_path / "a.safetensors", epochs=1).notes[0]


def test_two_processes_of_torchrun_train_the_bytes_of_one(
    llama: str, data: str, tmp_path: Path
) -> None:
    """Two ranks, one writer, who says everything once."""
    command = [
        *("train-adapter", "--model", llama, "--data", data, "--epochs", "2", "--lr", "1e-2"),
        *("--dropout", "0", "--batch-size", "6", "--micro-batch-tokens", "60"),
        *("--dtype", "float32", "--device", "cpu", "--rank", "4"),
    ]
    log = tmp_path / "log.jsonl"
    said = {}
    for processes in (1, 2):
        output = tmp_path / f"{processes}.safetensors"
        done = run_over(processes, *command, "-o", str(output), "--log", str(log))
        assert done.returncode == 0, done.stderr
        said[processes] = done.stderr.replace(str(output), "OUTPUT")
        assert len(log.read_text().splitlines()) == 2 * 3 + 2
    one, two = (tmp_path / f"{processes}.safetensors" for processes in (1, 2))
    assert one.read_bytes() == two.read_bytes()
    assert said[1] == said[2]


def test_the_log_holds_a_line_a_step_and_a_line_an_epoch(
    llama: str, data: str, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from lorakit.commands.train_adapter import train_adapter as command

    log = tmp_path / "log.jsonl"
    arguments = ["--data", data, "--model", llama, "--epochs", "2", "--batch-size", "8"]
    outcome = CliRunner().invoke(
        command,
        [*arguments, "-o", str(tmp_path / "a.safetensors"), "--log", str(log)],
        catch_exceptions=False,
    )
    assert outcome.exit_code == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [("validation_loss" in line) for line in lines] == [False, False, True] * 2
    assert lines[0].keys() == {
        "step",
        "epoch",
        "train_loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
    }
    assert outcome.stdout == ""
    assert "epoch 2/2" in outcome.stderr


class Interrupting(StepHook):
    """Breaks a run off within its second step, as a second Ctrl-C does."""

    name = "interrupting"

    def after_step(self, step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt


def test_a_run_that_is_broken_off_within_a_step_saves_no_half_of_it(
    llama: str, tmp_path: Path
) -> None:
    trainer = new_trainer(open_base(llama))
    trainer.hooks = (Interrupting(),)
    data = examples(trainer.base, 20)
    trainer.begin(data, data, Recorder())
    checkpoint = Checkpoint(tmp_path / "a.resume", "key")
    trainer.advance(until=1)
    checkpoint.save(trainer)
    saved = (tmp_path / "a.resume").read_bytes()
    with pytest.raises(KeyboardInterrupt), checkpoint.saving_at_end_of(trainer):
        trainer.advance()
    assert (tmp_path / "a.resume").read_bytes() == saved
    assert not trainer.is_between_steps
