from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter
from lorakit.errors import LorakitError
from lorakit.merging.adaptive import merge_adaptively
from lorakit.settings import LoraSettings, PruningSettings, SelectionSettings, TrainingSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.train import train_adapter
from lorakit.training.trainer import Trainer
from tests.support.models import open_base
from tests.support.training_data import Recorder, rows, save_rows

SETTINGS = TrainingSettings(lr=3e-2, epochs=6, patience=6, batch_size=4, dropout=0.1)
Merge = Callable[..., tuple[Recorder, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows(20))


@pytest.fixture(scope="module")
def merge(llama: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """Return a function that merges two trained adapters into a file."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters: list[Adapter] = []
    for name, rank in (("one", 3), ("two", 2)):
        train_adapter(
            open_base(llama),
            data,
            None,
            settings=replace(SETTINGS, epochs=2, seed=rank),
            lora=LoraSettings(rank=rank),
            output=str(folder / name),
            reporter=Recorder(),
        )
        adapters.append(load_adapter(str(folder / name)))

    def run(output: Path, **given: Any) -> tuple[Recorder, list[dict[str, Any]]]:
        watcher = Recorder()
        pruning = given.pop("pruning", PruningSettings())
        changes = given.pop("changes", {})
        tried = merge_adaptively(
            adapters,
            open_base(llama),
            data,
            None,
            settings=replace(SETTINGS, **changes),
            pruning=pruning,
            output=str(output),
            reporter=watcher,
            **given,
        )
        return watcher, tried

    return run


def decimals(*texts: str) -> list[Decimal]:
    return [Decimal(text) for text in texts]


def test_a_grid_keeps_the_bytes_of_its_best_candidate_run_alone(
    merge: Merge, tmp_path: Path
) -> None:
    values = decimals("0.7", "0", "0.3")
    _, tried = merge(tmp_path / "grid", values=values)
    assert [one["prune_ratio"] for one in tried] == [0, 0.3, 0.7]
    losses = {}
    for value in values:
        watcher, none = merge(tmp_path / str(value), values=[value])
        losses[float(value)] = min(entry["validation_loss"] for entry in watcher.epochs)
        assert none == []
    assert {one["prune_ratio"]: one["loss"] for one in tried} == losses
    (best,) = [one["prune_ratio"] for one in tried if one["best"]]
    assert losses[best] == min(losses.values())
    whole = load_adapter(str(tmp_path / "grid"))
    alone = load_adapter(str(tmp_path / str(Decimal(str(best)).normalize())))
    assert whole.sha256 == alone.sha256
    assert whole.header["history"][-1]["search"]["tried"] == tried
    assert whole.header["history"][-1]["settings"]["prune_ratio"] == best


def test_a_search_that_keeps_the_last_epoch_compares_the_last_epochs(
    merge: Merge, tmp_path: Path
) -> None:
    changes = {"keep": "last", "patience": 1, "lr": 0.3}
    values = decimals("0", "0.5")
    _, tried = merge(tmp_path / "grid", values=values, changes=changes)
    lasts, lowest = {}, {}
    for value in values:
        watcher, _ = merge(tmp_path / str(value), values=[value], changes=changes)
        losses = [entry["validation_loss"] for entry in watcher.epochs]
        assert len(losses) == SETTINGS.epochs
        lasts[float(value)], lowest[float(value)] = losses[-1], min(losses)
    assert {one["prune_ratio"]: one["loss"] for one in tried} == lasts != lowest
    (best,) = [one["prune_ratio"] for one in tried if one["best"]]
    assert lasts[best] == min(lasts.values())
    alone = load_adapter(str(tmp_path / str(Decimal(str(best)).normalize())))
    assert load_adapter(str(tmp_path / "grid")).sha256 == alone.sha256


def test_whole_pairs_are_searched_by_their_share(merge: Merge, tmp_path: Path) -> None:
    watcher, tried = merge(
        tmp_path / "m", pruning=PruningSettings(unit="module"), values=decimals("0.2", "0.3")
    )
    assert [one["prune_ratio"] for one in tried] == [0.2, 0.3]
    assert any("A/B pairs ended with A = B = 0" in note for note in watcher.notes)


def test_halving_takes_at_most_three_and_a_half_merges(merge: Merge, tmp_path: Path) -> None:
    once, _ = merge(tmp_path / "once")
    watcher, tried = merge(tmp_path / "auto", values="auto")
    assert [one["prune_ratio"] for one in tried] == [tenth / 10 for tenth in range(10)]
    assert len(watcher.steps) == sum(one["steps"] for one in tried)
    assert len(once.steps) < len(watcher.steps) <= 3.5 * len(once.steps)
    assert sum(one["best"] for one in tried) == 1
    assert sum(not one["stopped"] for one in tried) == 2
    assert [entry["candidate"] for entry in watcher.events] == [
        str(Decimal(tenth) / 10) for tenth in range(10)
    ]


def test_halving_keeps_its_bound_where_merges_stop_early(merge: Merge, tmp_path: Path) -> None:
    changes = {"lr": 0.5, "patience": 1, "epochs": 40}
    once, _ = merge(tmp_path / "once", changes=changes)
    watcher, _ = merge(tmp_path / "auto", changes=changes, values="auto")
    assert len(once.steps) < 40 * 4
    assert len(watcher.steps) <= 3.5 * len(once.steps)


def test_the_candidates_of_halving_are_the_runs_of_the_same_ratio(
    merge: Merge, tmp_path: Path
) -> None:
    watcher, _ = merge(tmp_path / "auto", values="auto")
    for ratio in ("0", "0.9"):
        alone, _ = merge(tmp_path / ratio, values=decimals(ratio))
        steps = [entry for entry in watcher.steps if entry["candidate"] == ratio]
        wanted = [entry["train_loss"] for entry in alone.steps[: len(steps)]]
        assert [entry["train_loss"] for entry in steps] == wanted


def test_a_search_says_when_no_pruning_wins(merge: Merge, tmp_path: Path) -> None:
    watcher, tried = merge(tmp_path / "m", values=decimals("0", "0.99"))
    assert [one["best"] for one in tried] == [True, False]
    assert any("pruning does not help here" in note for note in watcher.notes)


def test_a_metric_on_the_validation_set_decides(merge: Merge, tmp_path: Path) -> None:
    selection = SelectionSettings(select_by="loss", metric="chrf", max_new_tokens=8)
    watcher, tried = merge(tmp_path / "m", values=decimals("0", "0.5"), selection=selection)
    assert all(0 <= one["chrf"] <= 100 for one in tried)
    (best,) = [one["chrf"] for one in tried if one["best"]]
    assert best == max(one["chrf"] for one in tried)
    assert any("8 outputs generated" in note for note in watcher.notes), watcher.notes


def test_epochs_are_compared_by_the_metric_asked_for(merge: Merge, tmp_path: Path) -> None:
    selection = SelectionSettings(select_by="rouge1", max_new_tokens=8)
    watcher, _ = merge(tmp_path / "m", selection=selection)
    scores = [(e["validation_score"], -e["validation_loss"]) for e in watcher.epochs]
    kept = max(n for n, entry in enumerate(watcher.epochs) if entry["best"])
    assert scores[kept] == max(scores)
    told = load_adapter(str(tmp_path / "m")).header["history"][-1]["settings"]
    assert told["select_by"] == "rouge1"


def test_thresholds_are_the_tenths_of_the_distribution(merge: Merge, tmp_path: Path) -> None:
    pruning = PruningSettings(unit="module", prune_threshold=Decimal(0))
    watcher, tried = merge(tmp_path / "m", pruning=pruning, values="auto")
    told = watcher.events[0]
    assert told["modules"] == 2 * 2 * 3  # adapters, projections, layers
    assert [one["prune_threshold"] for one in tried] == [0, *told["quantiles"].values()]
    assert told["least"] <= told["quantiles"]["0.1"] <= told["quantiles"]["0.9"] <= told["most"]


@pytest.mark.parametrize("values", ["auto", decimals("0.2", "0.6")], ids=["auto", "grid"])
@pytest.mark.parametrize("importance", ["input", "gradient"])
def test_a_killed_search_goes_on_to_the_same_bytes(
    merge: Merge,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: Any,
    importance: str,
) -> None:
    pruning = PruningSettings(importance=importance)
    merge(tmp_path / "whole.safetensors", values=values, pruning=pruning)
    save, left = Checkpoint.save, 5

    def stop(self: Checkpoint, trainer: Trainer) -> None:
        nonlocal left
        save(self, trainer)
        left -= 1
        if not left % 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stop)
        for resume in (False, True):
            with pytest.raises(KeyboardInterrupt):
                merge(
                    tmp_path / "broken.safetensors", values=values, pruning=pruning, resume=resume
                )
    merge(tmp_path / "broken.safetensors", values=values, pruning=pruning, resume=True)
    assert (tmp_path / "broken.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken.safetensors",
        "whole.safetensors",
    ]


def test_a_merge_too_short_to_be_halved_is_refused(merge: Merge, tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="4 optimiser steps cannot be halved"):
        merge(tmp_path / "m", values="auto", changes={"epochs": 1})
