from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter
from lorakit.merging.adaptive import merge_adaptively
from lorakit.merging.search import search_by_ladder
from lorakit.runs.resume import SavedValues
from lorakit.settings import LoraSettings, PruningSettings, SelectionSettings, TrainingSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.train import train_adapter
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


def test_a_ladder_tries_all_tenths_where_it_can_and_ends_with_one_rival(
    merge: Merge, tmp_path: Path
) -> None:
    watcher, tried = merge(tmp_path / "auto", values="auto")
    assert [one["prune_ratio"] for one in tried] == [tenth / 10 for tenth in range(10)]
    assert [entry["candidate"] for entry in watcher.events] == [
        str(Decimal(tenth) / 10) for tenth in range(10)
    ]
    assert len(watcher.steps) == sum(one["steps"] for one in tried)
    assert len(watcher.steps) <= 4.5 * tried[0]["steps"]
    assert sum(one["best"] for one in tried) == 1
    assert sum(not one["stopped"] for one in tried) == 2
    assert min(one["steps"] for one in tried) == 4  # those that stopped first had an epoch to learn


@pytest.mark.parametrize(
    ("epochs", "ratios"),
    [
        (1, [0, 0.1, 0.3, 0.5]),
        (2, [0, 0.1, 0.3, 0.5, 0.7]),
        (3, [0, 0.1, 0.3, 0.5, 0.7, 0.9]),
    ],
    ids=str,
)
def test_a_short_merge_leaves_time_for_fewer_ratios(
    merge: Merge, tmp_path: Path, epochs: int, ratios: list[float]
) -> None:
    watcher, tried = merge(tmp_path / "auto", values="auto", changes={"epochs": epochs})
    assert [one["prune_ratio"] for one in tried] == ratios
    assert tried[0]["steps"] == 4 * epochs
    assert len(watcher.steps) <= 4.5 * 4 * epochs
    assert sum(not one["stopped"] for one in tried[1:]) == (3 if epochs < 3 else 2)


def test_a_ladder_keeps_its_bound_where_merges_stop_early(merge: Merge, tmp_path: Path) -> None:
    changes = {"lr": 0.5, "patience": 1, "epochs": 40}
    once, _ = merge(tmp_path / "once", changes=changes)
    watcher, tried = merge(tmp_path / "auto", changes=changes, values="auto")
    assert tried[0]["steps"] == len(once.steps) < 40 * 4
    assert len(watcher.steps) <= 4.5 * len(once.steps)


class Rehearsal:
    """Stands in for the search: candidates end after so many epochs and have fixed values."""

    def __init__(self, epochs: int, ends: dict[str, int], values: Callable[[str, int], float]):
        self.settings = replace(SETTINGS, epochs=epochs)
        self.ends, self.values = ends, values
        self.candidates: list[Any] = []

    def add(self, name: str, pruning: PruningSettings) -> Any:
        trainer = SimpleNamespace(steps=self.settings.epochs * 7, settings=self.settings)
        candidate = SimpleNamespace(name=name, trainer=trainer, steps=0, stopped=False)
        self.candidates.append(candidate)
        return candidate

    def judge(self, candidate: Any, epoch: int | None = None) -> None:
        end = min(self.ends.get(candidate.name, 99), self.settings.epochs)
        reached = end if epoch is None else min(epoch, end)
        assert 7 * reached > candidate.steps, "trained without need"
        candidate.steps, candidate.ended = 7 * reached, reached == end
        candidate.value = self.values(candidate.name, reached)


def ladder(epochs: int, ends: dict[str, int], values: Callable[[str, int], float]) -> list[Any]:
    """Return the candidates of a rehearsed ladder of ratios, in the order they were added."""
    search = Rehearsal(epochs, ends, values)
    settings = [(str(tenth), PruningSettings(Decimal(tenth) / 10)) for tenth in range(10)]
    search_by_ladder(search, settings[0], lambda baseline: settings[1:])  # type: ignore[arg-type]
    return search.candidates


@pytest.mark.parametrize("epochs", range(1, 21))
def test_every_ladder_ends_in_time_with_a_rival_as_far_as_the_baseline(epochs: int) -> None:
    for end, rivals_end in itertools.product((1, 2, 3, 5, 8, 13, 20), (1, 4, 20)):
        ends = {"0": end, **{str(tenth): rivals_end + tenth % 3 for tenth in range(1, 10)}}
        baseline, *rivals = ladder(epochs, ends, lambda name, epoch: int(name) * 7 % 10 + epoch)
        assert baseline.steps == 7 * min(epochs, end)
        assert baseline.steps + sum(rival.steps for rival in rivals) <= 4.5 * baseline.steps
        complete = [rival for rival in rivals if not rival.stopped]
        assert complete
        assert all(rival.ended or rival.steps >= baseline.steps for rival in complete)
        assert all(rival.steps >= 7 for rival in rivals)


@pytest.mark.parametrize(
    ("epochs", "going"),
    [
        (1, [3]),
        (2, [4, 3]),
        (3, [5, 3, 2]),
        (5, [8, 4, 2, 2, 1]),
        (6, [9, 5, 3, 2, 1, 1]),
        (20, [9] * 5 + [7, 4, 2] + [1] * 12),
    ],
    ids=str,
)
def test_rivals_are_halved_as_late_as_the_budget_allows(epochs: int, going: list[int]) -> None:
    _, *rivals = ladder(epochs, {}, lambda name, epoch: int(name))
    reached = [rival.steps // 7 for rival in rivals]
    assert [sum(end >= epoch for end in reached) for epoch in range(1, epochs + 1)] == going
    assert reached == sorted(reached)  # the better rivals, here those that prune more, go on


def test_what_is_left_goes_to_rivals_whose_training_is_not_over() -> None:
    baseline, *rivals = ladder(20, {"0": 3}, lambda name, epoch: int(name))
    assert baseline.steps == 7 * 3
    assert [rival.steps // 7 for rival in rivals] == [1, 1, 2, 3, 3]
    assert [rival.stopped for rival in rivals] == [True, True, True, False, False]


def test_the_candidates_of_a_ladder_are_the_runs_of_the_same_ratio(
    merge: Merge, tmp_path: Path
) -> None:
    watcher, _ = merge(tmp_path / "auto", values="auto")
    for ratio in ("0", "0.9"):
        alone, _ = merge(tmp_path / ratio, values=decimals(ratio))
        steps = [entry for entry in watcher.steps if entry["candidate"] == ratio]
        wanted = [entry["train_loss"] for entry in alone.steps[: len(steps)]]
        assert [entry["train_loss"] for entry in steps] == wanted


def test_a_search_with_and_without_pruning_ends_in_a_verdict(merge: Merge, tmp_path: Path) -> None:
    watcher, tried = merge(tmp_path / "m", values=decimals("0", "0.99"))
    assert [one["best"] for one in tried] == [True, False]
    test = load_adapter(str(tmp_path / "m")).header["history"][-1]["search"]["test"]
    assert isinstance(test, dict)
    assert test["against"] == 0.99
    assert test["difference"] == pytest.approx(tried[0]["loss"] - tried[1]["loss"], abs=1e-5)
    assert 0 < test["p_value"] <= 1
    told = f"no pruning and pruning at 0.99 (p = {test['p_value']:.4f})"
    assert any(told in note.replace(" is better than ", " and ") for note in watcher.notes)


def test_a_search_without_zero_has_no_verdict(merge: Merge, tmp_path: Path) -> None:
    watcher, _ = merge(tmp_path / "m", values=decimals("0.2", "0.9"))
    assert "test" not in load_adapter(str(tmp_path / "m")).header["history"][-1]["search"]
    assert any("best by loss" in note for note in watcher.notes)


@pytest.mark.parametrize("metric", [None, "chrf"], ids=["loss", "chrf"])
def test_intervals_are_for_the_plot_and_change_no_byte(
    merge: Merge, tmp_path: Path, metric: str | None
) -> None:
    selection = SelectionSettings(metric=metric, max_new_tokens=8)
    options = {"values": decimals("0", "0.5"), "selection": selection, "changes": {"epochs": 2}}
    _, tried = merge(tmp_path / "without", **options)
    _, rows = merge(tmp_path / "with", intervals=True, **options)
    assert load_adapter(str(tmp_path / "with")).sha256 == (
        load_adapter(str(tmp_path / "without")).sha256
    )
    for row, trial in zip(rows, tried, strict=True):
        low, high = row.pop("interval")
        assert row == trial
        assert low <= trial[metric or "loss"] <= high


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


SEARCHES: dict[str, dict[str, Any]] = {
    "auto": {"values": "auto"},
    "auto by gradient": {"values": "auto", "pruning": PruningSettings(importance="gradient")},
    "auto thresholds": {"values": "auto", "pruning": PruningSettings(unit="module")},
    "auto by a metric": {
        "values": "auto",
        "selection": SelectionSettings(metric="chrf", max_new_tokens=4),
        "changes": {"epochs": 3},
    },
    "grid": {"values": decimals("0", "0.6")},
    "grid by gradient": {
        "values": decimals("0.2", "0.6"),
        "pruning": PruningSettings(importance="gradient"),
    },
}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES.keys())
def test_a_search_killed_again_and_again_goes_on_to_the_same_bytes(
    merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    merge(tmp_path / "whole.safetensors", **options)
    saves = 0

    def then_kill(save: Callable[..., None]) -> Callable[..., None]:
        def save_and_kill(*arguments: object) -> None:
            nonlocal saves
            save(*arguments)
            saves += 1
            if not saves % 5:
                raise KeyboardInterrupt

        return save_and_kill

    kills = 0
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", then_kill(Checkpoint.save))
        patch.setattr(SavedValues, "add", then_kill(SavedValues.add))
        while not (tmp_path / "broken.safetensors").exists():
            try:
                merge(tmp_path / "broken.safetensors", resume=kills > 0, **options)
            except KeyboardInterrupt:
                kills += 1
    assert kills > 1
    assert (tmp_path / "broken.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken.safetensors",
        "whole.safetensors",
    ]
