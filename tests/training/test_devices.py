"""What training promises on every device: on the CPU, and on a GPU by `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorakit.models.base import Base
from lorakit.models.devices import pick_dtype
from lorakit.models.loading import load_base
from lorakit.models.lora import factors, inject, pick_modules
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.records.record import Record
from lorakit.settings import LoraSettings, TrainingSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.train import train_adapter
from lorakit.training.trainer import Trainer
from tests.support.devices import DEVICES, here
from tests.support.training_data import Recorder, rows, save_rows

SETTINGS = TrainingSettings(lr=1e-2, epochs=3, batch_size=6, dropout=0.0, dtype="float32")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return here(request.param)


@pytest.fixture
def base(llama: str, device: torch.device) -> Base:
    return load_base(llama, device=device, dtype=torch.float32)


def examples(base: Base, count: int) -> list[Example]:
    encoder = base.encoder(chat="off")
    return [encoder.example(Record(row, f"row {row['id']}")) for row in rows(count)]


def new_trainer(base: Base, *, seed: int = 0, dropout: float = 0.0) -> Trainer:
    torch.manual_seed(0)
    ranks = dict.fromkeys(pick_modules(base, ["q_proj", "v_proj"], None), 4)
    layers = inject(base, ranks, alpha=8, dropout=dropout)
    for layer in layers.values():  # a B of zeros would hide the gradient of A
        torch.nn.init.normal_(factors(layer)[1], std=0.1)
    settings = replace(SETTINGS, seed=seed, dropout=dropout, device=base.device.type)
    return Trainer(base, layers, settings, accelerator=new_accelerator(base.device.type))


def gradients(trainer: Trainer, batch: list[Example]) -> list[torch.Tensor]:
    trainer.losses.backward(batch)
    values = [weight.grad.clone() for weight in trainer.parameters if weight.grad is not None]
    trainer.optimizer.zero_grad()
    return values


def losses_with_dropout(base: Base, seed: int) -> list[float]:
    trainer, watcher, rows_ = (
        new_trainer(base, seed=seed, dropout=0.5),
        Recorder(),
        examples(base, 6),
    )
    trainer.begin(rows_, rows_, watcher)
    trainer.advance()
    trainer.advance()
    return [entry["train_loss"] for entry in watcher.steps]


def test_the_masks_of_dropout_hang_on_the_seed_alone(base: Base) -> None:
    first = losses_with_dropout(base, seed=0)
    assert losses_with_dropout(base, seed=0) == first
    assert losses_with_dropout(base, seed=1) != first


def test_rows_that_share_a_batch_learn_what_each_learns_alone(base: Base) -> None:
    trainer, batch = new_trainer(base), examples(base, 5)
    assert len({len(row.ids) for row in batch}) > 1, "some row must be padded, or packed"
    targets = sum(row.targets for row in batch)
    alone = [gradients(trainer, [row]) for row in batch]
    sums = [
        sum(part * row.targets / targets for part, row in zip(parts, batch, strict=True))
        for parts in zip(*alone, strict=True)
    ]
    for together, apart in zip(gradients(trainer, batch), sums, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_to_the_whole_batch(base: Base) -> None:
    trainer, batch = new_trainer(base), examples(base, 8)
    whole = gradients(trainer, batch)
    trainer.losses.tokens = 60
    assert len(trainer.losses.micro_batches(batch)) > 1
    for cut, uncut in zip(gradients(trainer, batch), whole, strict=True):
        torch.testing.assert_close(cut, uncut, rtol=1e-4, atol=1e-6)


def fit(llama: str, device: torch.device, data: str, output: Path, *, resume: bool = False) -> None:
    train_adapter(
        load_base(llama, device=device, dtype=torch.float32),
        data,
        None,
        settings=replace(SETTINGS, dropout=0.1, device=device.type),
        lora=LoraSettings(rank=4, alpha=8),
        output=str(output),
        reporter=Recorder(),
        resume=resume,
    )


def test_a_resumed_run_gives_the_bytes_of_an_unbroken_one(
    llama: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, whole, broken = save_rows(tmp_path / "data", rows(20)), tmp_path / "a", tmp_path / "b"
    whole, broken = (path.with_suffix(".safetensors") for path in (whole, broken))
    fit(llama, device, data, whole)
    save = Checkpoint.save

    def stop(self: Checkpoint, trainer: Trainer) -> None:
        save(self, trainer)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(llama, device, data, broken)
    fit(llama, device, data, broken, resume=True)
    assert broken.read_bytes() == whole.read_bytes()


def test_a_resumed_run_does_so_with_a_fused_optimiser_too(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *given, **named: plain(*given, **{**named, "fused": True})
    )
    test_a_resumed_run_gives_the_bytes_of_an_unbroken_one(
        llama, torch.device("cpu"), tmp_path, monkeypatch
    )


def test_auto_is_bfloat16_where_the_device_multiplies_it_fast(device: torch.device) -> None:
    """On a CPU by its matrix instructions, on a GPU by its own word."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = Path("/proc/cpuinfo")
        fast = flags.exists() and "amx_tile" in flags.read_text().split()
    chosen = pick_dtype("auto", device, training=True)
    assert chosen == (torch.bfloat16 if fast else torch.float32)


def test_lora_weights_stay_float32_over_a_bfloat16_base(llama: str, device: torch.device) -> None:
    base = load_base(llama, device=device, dtype=torch.bfloat16)
    trainer = new_trainer(base)
    assert {weight.dtype for weight in trainer.parameters} == {torch.float32}
    assert all(bool(grad.isfinite().all()) for grad in gradients(trainer, examples(base, 4)))
