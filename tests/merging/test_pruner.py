from __future__ import annotations

import itertools
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter
from lorakit.merging.adaptive import merge_adaptively
from lorakit.merging.criteria import CRITERIA, VALUES
from lorakit.merging.input_norms import InputNorms
from lorakit.merging.joint import attach_stack
from lorakit.merging.pruner import Pruner, pruning_hooks
from lorakit.merging.stack import Stack, stack
from lorakit.models.base import Base
from lorakit.models.lora import factors
from lorakit.models.tokens import Example
from lorakit.records.record import Record
from lorakit.settings import LoraSettings, PruningSettings, TrainingSettings
from lorakit.training.loss import new_accelerator
from lorakit.training.train import train_adapter
from lorakit.training.trainer import Trainer
from tests.support.models import open_base
from tests.support.training_data import Recorder, rows, save_rows

SETTINGS = TrainingSettings(lr=5e-2, epochs=2, batch_size=4, dropout=0.0, max_grad_norm=0.05)
COMBINATIONS = list(itertools.product(CRITERIA, ["parameter", "module"], VALUES))


@pytest.fixture(scope="module")
def adapters(llama: str, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Two trained adapters that differ in rank, scale, targets and layers."""
    folder = tmp_path_factory.mktemp("adapters")
    data = save_rows(folder / "train.jsonl", rows(12))
    shapes = {
        "one": LoraSettings(rank=3, alpha=6),
        "two": LoraSettings(rank=2, alpha=3, target_modules=("q_proj", "up_proj"), layers=(1,)),
    }
    for name, lora in shapes.items():
        train_adapter(
            open_base(llama),
            data,
            None,
            settings=replace(SETTINGS, max_grad_norm=1.0),
            lora=lora,
            output=str(folder / name),
            reporter=Recorder(),
        )
    return [load_adapter(str(folder / name)) for name in shapes]


def parts(stacked: Stack, weights: dict[str, Any]) -> dict[tuple[str, str, str], Any]:
    """Return every block's A and B at every module, by block, module and letter."""
    found = {}
    for block in stacked.blocks:
        for name, part in block.modules.items():
            a, b = weights[name]
            rows_of = slice(part.offset, part.offset + part.rank)
            found[block.name, name, "A"] = a[rows_of].copy()
            found[block.name, name, "B"] = b[:, rows_of].copy()
    return found


class Restated:
    """What pruning is to do, said again: numpy, one matrix and one parameter at a time."""

    def __init__(self, stacked: Stack, start: dict[Any, Any], settings: PruningSettings) -> None:
        self.stacked, self.start, self.settings = stacked, start, settings
        self.mean = {key: np.zeros_like(value) for key, value in start.items()}
        self.spread = {key: np.zeros_like(value) for key, value in start.items()}

    def chosen(self, weights: Any, gradients: Any, norms: InputNorms) -> dict[Any, Any]:
        scores = {key: self._score(key, w, gradients[key], norms) for key, w in weights.items()}
        masks = {}
        for key, score in scores.items():
            if self.settings.unit == "module":
                both = np.concatenate([scores[(*key[:2], letter)].ravel() for letter in "AB"])
                low = both.mean() < float(self.settings.prune_threshold or 0)
                masks[key] = np.full(score.shape, low)
            else:
                count = int(self.settings.prune_ratio * score.size)
                order = np.argsort(score, axis=None, kind="stable")
                flat = np.zeros(score.size, bool)
                flat[order[:count]] = True
                masks[key] = flat.reshape(score.shape)
        return masks

    def _score(self, key: Any, weight: Any, gradient: Any, norms: InputNorms) -> Any:
        if self.settings.importance == "magnitude":
            return np.abs(weight)
        if self.settings.importance == "gradient":
            now = np.abs(weight * gradient)
            self.mean[key] = 0.85 * self.mean[key] + 0.15 * now
            self.spread[key] = 0.85 * self.spread[key] + 0.15 * np.abs(now - self.mean[key])
            return self.mean[key] * self.spread[key]
        block, name, letter = key
        of_x, of_ax = (norm.numpy() for norm in norms.norms(name))
        part = next(b for b in self.stacked.blocks if b.name == block).modules[name]
        read = of_x if letter == "A" else of_ax[part.offset : part.offset + part.rank]
        return np.abs(weight) * read[None, :]


@pytest.mark.parametrize(("importance", "unit", "value"), COMBINATIONS)
def test_every_combination_resets_what_its_restatement_says(
    llama: str, adapters: list[Adapter], importance: str, unit: str, value: str
) -> None:
    base = open_base(llama)
    stacked = stack(adapters)
    layers = attach_stack(base, stacked, dropout=0.0)
    settings = _settings(base, stacked, layers, importance, unit, value)
    norms = InputNorms(layers)
    watched = Watched(stacked, layers, settings, norms)
    trainer = Trainer(
        base, layers, SETTINGS, accelerator=new_accelerator("cpu"), hooks=(norms, watched)
    )
    some = examples(base)
    list(trainer.train(some, some[:5], Recorder()))
    assert watched.calls == trainer.steps == 6
    assert watched.resets > 0
    assert watched.resets < watched.parameters * watched.calls


class Watched(Pruner):
    """A pruner that checks each of its calls against the restatement."""

    def __init__(
        self, stacked: Stack, layers: Any, settings: PruningSettings, norms: InputNorms
    ) -> None:
        super().__init__(stacked.blocks, layers, settings, norms=norms)
        self.norms = norms
        self.stacked, self.layers, self.settings = stacked, layers, settings
        self.start = parts(stacked, self.all())
        self.naive = Restated(stacked, self.start, settings)
        self.parameters = sum(value.size for value in self.start.values())
        self.calls = self.resets = 0
        self.gradients: dict[str, Any] = {}

    def all(self) -> dict[str, Any]:
        return {n: [f.detach().numpy() for f in factors(layer)] for n, layer in self.layers.items()}

    def before_clipping(self) -> None:
        super().before_clipping()
        self.gradients = {
            n: [f.grad.numpy().copy() for f in factors(layer) if f.grad is not None]
            for n, layer in self.layers.items()
        }

    def after_step(self, step: int) -> None:
        before = parts(self.stacked, self.all())
        gradients = parts(self.stacked, self.gradients)
        masks = self.naive.chosen(before, gradients, self.norms)
        super().after_step(step)
        after = parts(self.stacked, self.all())
        self.calls += 1
        for key, mask in masks.items():
            assert np.array_equal(after[key][~mask], before[key][~mask]), key
            self._check_values(key, after[key][mask], mask, before[key].shape)
            self.resets += int(mask.sum())

    def _check_values(self, key: Any, found: Any, mask: Any, shape: Any) -> None:
        value = self.settings.prune_value
        if value == "init":
            assert np.array_equal(found, self.start[key][mask]), key
        elif value == "zero" or key[2] == "B":
            assert not found.any(), key
        else:
            assert (np.abs(found) <= 1 / np.sqrt(shape[1])).all(), key
            assert len(np.unique(found)) == found.size, key


def _settings(
    base: Base, stacked: Stack, layers: Any, importance: str, unit: str, value: str
) -> PruningSettings:
    if unit == "parameter":
        return PruningSettings(Decimal("0.23"), importance, prune_value=value)
    plain = PruningSettings(importance=importance, unit="module", prune_value=value)
    weights = {n: [f.detach().clone() for f in factors(layer)] for n, layer in layers.items()}
    hooks = pruning_hooks(stacked.blocks, layers, plain)
    trainer = Trainer(base, layers, SETTINGS, accelerator=new_accelerator("cpu"), hooks=hooks)
    some = examples(base)
    trainer.begin(some, some[:5], Recorder())
    trainer.advance(until=1)
    with torch.no_grad():
        pruner = hooks[-1]
        assert isinstance(pruner, Pruner)
        middle = float(np.median(list(pruner.mean_importances().values())))
        for name, layer in layers.items():
            for factor, was in zip(factors(layer), weights[name], strict=True):
                factor.copy_(was)
    return plain.at(Decimal(middle))


def examples(base: Base) -> list[Example]:
    encoder = base.encoder(chat="off")
    return [encoder.example(Record(row, row["id"])) for row in rows(12)]


@pytest.mark.parametrize(("importance", "unit", "value"), COMBINATIONS)
def test_every_combination_merges_to_a_file(
    llama: str, adapters: list[Adapter], tmp_path: Path, importance: str, unit: str, value: str
) -> None:
    settings = PruningSettings(importance=importance, unit=unit, prune_value=value)
    merge_adaptively(
        adapters,
        open_base(llama),
        save_rows(tmp_path / "data", rows(10)),
        None,
        settings=replace(SETTINGS, epochs=1),
        pruning=settings.at(Decimal("0.3") if unit == "parameter" else Decimal("1e-3")),
        output=str(tmp_path / "m"),
        reporter=Recorder(),
    )
    told = load_adapter(str(tmp_path / "m")).header["history"][-1]["settings"]
    assert (told["importance"], told["unit"], told["prune_value"]) == (importance, unit, value)


def test_the_gradient_is_taken_as_it_was_before_clipping(
    llama: str, adapters: list[Adapter]
) -> None:
    base = open_base(llama)
    stacked = stack(adapters)
    layers = attach_stack(base, stacked, dropout=0.0)
    pruner = Pruner(stacked.blocks, layers, PruningSettings(Decimal("0.1"), "gradient"))
    trainer = Trainer(base, layers, SETTINGS, accelerator=new_accelerator("cpu"), hooks=(pruner,))
    some = examples(base)
    trainer.begin(some, some, Recorder())
    report = trainer._step(some[:4], 10)
    kept = torch.cat([g.flatten() for both in pruner._gradients.values() for g in both])
    assert float(kept.norm()) == pytest.approx(report.grad_norm, rel=1e-4)
    assert report.grad_norm > SETTINGS.max_grad_norm
