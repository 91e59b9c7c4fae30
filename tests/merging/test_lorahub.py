from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter
from lorakit.errors import LorakitError
from lorakit.merging import lorahub
from lorakit.merging.lorahub import Point, bounded, compose, merge_lorahub, search_weights
from lorakit.models.batches import micro_batches
from lorakit.records.record import Record
from lorakit.settings import LoraSettings, TrainingSettings
from lorakit.training.loss import BatchLoss
from lorakit.training.train import train_adapter
from tests.support.models import open_base
from tests.support.training_data import Recorder, rows, save_rows

SETTINGS = TrainingSettings(lr=5e-2, epochs=3, batch_size=4, dropout=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "few.jsonl", rows(12))


@pytest.fixture(scope="module")
def adapters(llama: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Two of one shape, and a third of another rank."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, rank in (("one", 2), ("two", 2), ("odd", 3)):
        train_adapter(
            open_base(llama),
            data,
            None,
            settings=replace(SETTINGS, seed=len(name)),
            lora=LoraSettings(rank=rank, alpha=4),
            output=str(folder / name),
            reporter=Recorder(),
        )
    return [load_adapter(str(folder / name)) for name in ("one", "two", "odd")]


def merge(llama: str, adapters: Sequence[Adapter], data: str, output: Path) -> Recorder:
    watcher = Recorder()
    merge_lorahub(
        adapters,
        open_base(llama),
        data,
        settings=SETTINGS,
        output=str(output),
        reporter=watcher,
    )
    return watcher


def test_the_objective_is_the_mean_of_mean_token_losses_and_a_penalty(
    llama: str, adapters: list[Adapter], data: str, tmp_path: Path
) -> None:
    """Every point again, with the dense ΔW added to the base and one example at a time."""
    told = merge(llama, adapters[:2], data, tmp_path / "m").events
    points = [Point(tuple(e["weights"]), e["loss"], e["objective"]) for e in told]
    assert 10 < len(points) <= lorahub.EVALUATIONS
    for point in points[:3] + points[-2:]:
        base = open_base(llama)
        encoder = base.encoder(chat="off")
        for name, (a, b) in compose(adapters[:2], point.weights).items():
            change = 2.0 * torch.tensor(b.astype(np.float64) @ a.astype(np.float64))
            base.model.get_submodule(name).weight.data += change.float()
        losses = []
        for row in rows(12):
            example = encoder.example(Record(row, row["id"]))
            ids = torch.tensor([example.ids])
            labels = ids.clone()
            labels[:, : example.start] = -100
            losses.append(float(base.model(input_ids=ids, labels=labels).loss.detach()))
        assert point.loss == pytest.approx(sum(losses) / 12, abs=1e-4)
        penalty = 0.05 * (abs(point.weights[0]) + abs(point.weights[1])) / 2
        assert point.objective == pytest.approx(point.loss + penalty)


def test_the_best_point_tried_is_what_is_written(
    llama: str, adapters: list[Adapter], data: str, tmp_path: Path
) -> None:
    watcher = merge(llama, adapters[:2], data, tmp_path / "m")
    merged = load_adapter(str(tmp_path / "m"))
    entry = merged.header["history"][-1]
    best = min(watcher.events, key=lambda event: event["objective"])
    assert entry["evaluations"][0]["weights"] == [0, 0]
    assert len(entry["evaluations"]) == len(watcher.events)
    assert list(entry["settings"]["weights"].values()) == list(best["weights"])
    assert entry["best"]["objective"] == best["objective"] < watcher.events[0]["objective"]
    factors = compose(adapters[:2], best["weights"])
    for module in merged.modules():
        assert np.array_equal(module.a, factors[module.name][0])
        assert np.array_equal(module.b, factors[module.name][1])
        assert module.scale == 2.0


def test_all_evaluations_take_one_pass_over_the_examples_each(
    llama: str, adapters: list[Adapter], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0
    plain = BatchLoss._losses

    def counted(self: BatchLoss, part: Sequence[object], **given: str) -> torch.Tensor:
        nonlocal passes
        passes += len(part)
        return plain(self, part, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(BatchLoss, "_losses", counted)
    told = merge(llama, adapters[:2], data, tmp_path / "m").events
    assert passes == 12 * len(told) <= 45 * 12
    assert len(micro_batches([], 10)) == 0


def test_the_same_data_give_the_same_bytes(
    llama: str, adapters: list[Adapter], data: str, tmp_path: Path
) -> None:
    for name in "ab":
        merge(llama, adapters[:2], data, tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_adapters_of_other_shapes_are_refused_by_the_module(
    llama: str, adapters: list[Adapter], data: str, tmp_path: Path
) -> None:
    with pytest.raises(LorakitError, match=r"odd: model\.layers\.0\.self_attn\.q_proj has A of"):
        merge(llama, adapters, data, tmp_path / "m")


@pytest.mark.parametrize(
    ("z", "weight"),
    [(0, 0), (2, 1), (-2, -1), (3, 1.5), (4, 1.0), (-4, -1.0), (10, -1.5), (-10, 1.5), (6, 0)],
)
def test_weights_are_reflected_at_the_bounds_and_clipped(z: float, weight: float) -> None:
    assert bounded(np.array([z])).tolist() == [weight]


def test_the_search_finds_the_minimum_of_a_bowl() -> None:
    points = search_weights(
        lambda w: (w[0] - 0.7) ** 2 + (w[1] + 0.4) ** 2, 2, lambda number, point: None
    )
    assert len(points) <= 40
    best = min(points, key=lambda point: point.objective)
    assert math.dist(best.weights, (0.7 - 0.0125, -0.4 + 0.0125)) < 0.05
