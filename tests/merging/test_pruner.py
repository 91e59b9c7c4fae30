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
from lorakit.adapters.describe import inspect_adapter
from lorakit.adapters.storage import load_adapter
from lorakit.merging.adaptive import merge_adaptively
from lorakit.merging.criteria import CRITERIA, VALUES
from lorakit.merging.groups import GROUPS, PAIR_GROUPS
from lorakit.merging.input_norms import InputNorms
from lorakit.merging.joint import attach_stack
from lorakit.merging.pruner import Pruner, pruning_hooks
from lorakit.merging.stack import Stack, fold, stack
from lorakit.models.base import Base
from lorakit.models.lora import factors
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.records.record import Record
from lorakit.settings import LoraSettings, PruningSettings, TrainingSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.train import train_adapter
from lorakit.training.trainer import Trainer
from tests.support.models import open_base
from tests.support.training_data import Recorder, rows, save_rows

SETTINGS = TrainingSettings(lr=5e-2, epochs=2, batch_size=4, dropout=0.0, max_grad_norm=0.05)
ON_CPU = {"accelerator": new_accelerator("cpu")}
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
    """What pruning is to do, said again: numpy, one group and one parameter at a time."""

    def __init__(
        self, stacked: Stack, start: dict[Any, Any], settings: PruningSettings, tokens: int
    ) -> None:
        self.stacked, self.start, self.settings, self.tokens = stacked, start, settings, tokens
        self.mean = {key: np.zeros_like(value) for key, value in start.items()}
        self.spread = {key: np.zeros_like(value) for key, value in start.items()}

    def smooth(self, weights: Any, gradients: Any) -> None:
        for key, weight in weights.items():
            now = np.abs(weight * gradients[key])
            self.mean[key] = 0.85 * self.mean[key] + 0.15 * now
            self.spread[key] = 0.85 * self.spread[key] + 0.15 * np.abs(now - self.mean[key])

    def chosen(self, weights: Any, norms: InputNorms) -> dict[Any, Any]:
        scores = {key: self._score(key, weight, norms) for key, weight in weights.items()}
        masks = {key: np.zeros(score.shape, bool) for key, score in scores.items()}
        if self.settings.unit == "module":
            for pair in self._pairs_to_reset(scores):
                for letter in "AB":
                    masks[(*pair, letter)][:] = True
            return masks
        groups: dict[Any, list[Any]] = {}
        for key, score in scores.items():
            block, name, letter = key
            for row, column in np.ndindex(score.shape):
                group = {
                    "matrix": key,
                    "pair": (block, name),
                    "row": (*key, row),
                    "adapter": block,
                    "all": None,
                }[self.settings.group]
                value = score[row, column]
                if self.settings.group in ("adapter", "all"):
                    value = value * self._comparable(key)
                groups.setdefault(group, []).append((value, (*key, row, column)))
        for members in groups.values():
            members.sort(key=lambda member: member[0])
            for _, (block, name, letter, row, column) in members[: self._count(len(members))]:
                masks[block, name, letter][row, column] = True
        return masks

    def _count(self, size: int) -> int:
        return int(self.settings.prune_ratio * size)

    def _pairs_to_reset(self, scores: Any) -> list[Any]:
        values: dict[Any, list[float]] = {key[:2]: [] for key in scores}
        for key, score in scores.items():
            values[key[:2]].extend((score * self._comparable(key)).ravel().tolist())
        means = {pair: float(np.mean(of_pair)) for pair, of_pair in values.items()}
        if self.settings.prune_threshold is not None:
            return [pair for pair in means if means[pair] < float(self.settings.prune_threshold)]
        chosen = []
        blocks = {pair[0] for pair in means}
        groups = [[b] for b in blocks] if self.settings.group == "adapter" else [list(blocks)]
        for group in groups:
            own = sorted((pair for pair in means if pair[0] in group), key=means.__getitem__)
            left = self._count(sum(len(values[pair]) for pair in own))
            for pair in own:
                left -= len(values[pair])
                if left < 0:
                    break
                chosen.append(pair)
        return chosen

    def _comparable(self, key: Any) -> Any:
        """Return the adapter's scale, over √tokens where norms are read."""
        block, name, _ = key
        part = next(b for b in self.stacked.blocks if b.name == block).modules[name]
        scale = 1.0 if self.settings.importance == "gradient" else part.scale
        root = self.tokens**0.5 if self.settings.importance == "input" else 1.0
        return np.float32(scale) / np.float32(root)

    def _score(self, key: Any, weight: Any, norms: InputNorms) -> Any:
        if self.settings.importance == "magnitude":
            return np.abs(weight)
        if self.settings.importance == "gradient":
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
    watched, recorder = train_watched(
        llama,
        adapters,
        lambda base, stacked, layers: _settings(base, stacked, layers, importance, unit, value),
    )
    assert watched.prunings == len(recorder.steps) == 6
    assert 0 < watched.resets < watched.parameters * watched.prunings


GROUP_CASES = {
    f"{unit} {group} {importance}": PruningSettings(
        Decimal("0.31"), importance, unit=unit, group=group
    )
    for unit, groups in (("parameter", GROUPS), ("module", ("matrix", *PAIR_GROUPS)))
    for group in groups
    for importance in CRITERIA
}


@pytest.mark.parametrize("settings", GROUP_CASES.values(), ids=GROUP_CASES.keys())
def test_every_group_resets_what_its_restatement_says(
    llama: str, adapters: list[Adapter], settings: PruningSettings
) -> None:
    watched, recorder = train_watched(llama, adapters, settings)
    shares = [entry["share_pruned"] for entry in recorder.steps]
    assert watched.prunings == 6
    assert sum(shares) == pytest.approx(watched.resets / watched.parameters)
    assert all(0 < share <= 0.31 for share in shares)
    if settings.group in PAIR_GROUPS and settings.unit == "parameter":
        assert min(shares) > 0.31 - 3 / watched.parameters


@pytest.mark.parametrize(
    ("every", "pruned"),
    [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 3, 4, 6]), (7, [3, 6]), ("epoch", [3, 6])],
    ids=str,
)
@pytest.mark.parametrize("importance", ["input", "gradient"])
def test_pruning_comes_every_so_many_steps_and_before_every_epochs_end(
    llama: str, adapters: list[Adapter], importance: str, every: Any, pruned: list[int]
) -> None:
    settings = PruningSettings(Decimal("0.3"), importance, prune_every=every)
    watched, recorder = train_watched(llama, adapters, settings)
    assert [e["step"] for e in recorder.steps if e["share_pruned"]] == pruned
    assert watched.prunings == len(pruned)
    with_turnover = [e["step"] for e in recorder.steps if e["turnover"] is not None]
    assert with_turnover == pruned[1:]


def test_the_log_tells_shares_turnover_and_dead_pairs_as_counted_naively(
    llama: str, adapters: list[Adapter]
) -> None:
    settings = PruningSettings(Decimal("0.4"), unit="module")
    watched, recorder = train_watched(llama, adapters, settings)
    earlier: set[Any] = set()
    for number, entry in enumerate(recorder.steps):
        now = watched.chosen[number]
        assert entry["share_pruned"] == len(now) / watched.parameters
        wanted = None if number == 0 else len(now - earlier) / len(now)
        assert entry["turnover"] == wanted
        assert entry["dead_pairs"] == watched.dead[number] > 0
        earlier = now


def test_a_note_says_where_the_same_parameters_are_chosen_at_every_step(
    llama: str, adapters: list[Adapter]
) -> None:
    notes = {}
    for lr in (1e-6, 5e-2):
        _, recorder = train_watched(llama, adapters, PruningSettings(Decimal("0.3")), lr=lr)
        turnovers = [e["turnover"] for e in recorder.steps[1:]]
        notes[lr] = [note for note in recorder.notes if "the same parameters" in note]
        assert (sum(turnovers) / len(turnovers) < 0.01) == bool(notes[lr])
    assert notes == {
        1e-6: [
            "the same parameters were chosen at every step (mean turnover 0.00%); a larger --lr "
            "or --prune-every lets them grow"
        ],
        5e-2: [],
    }


def test_a_note_says_how_many_pairs_are_dead(llama: str, adapters: list[Adapter]) -> None:
    for value, dead in (("zero", 1), ("init", 0)):
        settings = PruningSettings(Decimal("0.4"), unit="module", prune_value=value)
        watched, recorder = train_watched(llama, adapters, settings)
        notes = [note for note in recorder.notes if "A/B pairs ended with A = B = 0" in note]
        assert len(notes) == dead
        if notes:
            assert notes[0].startswith(f"{watched.dead[-1]} of 8 A/B pairs")


def train_watched(
    llama: str, adapters: list[Adapter], settings: Any, **changes: Any
) -> tuple[Watched, Recorder]:
    """Train two epochs of three steps, each pruning checked against the restatement.

    `settings` are PruningSettings, or return those for a base, a stack and its layers.
    """
    base = open_base(llama)
    stacked = stack(adapters)
    layers = attach_stack(base, stacked, dropout=0.0)
    if callable(settings):
        settings = settings(base, stacked, layers)
    norms = InputNorms(layers)
    some = examples(base)
    tokens = sum(len(example.ids) - 1 for example in some[:5])
    watched = Watched(stacked, layers, settings, norms, tokens)
    trainer = Trainer(
        base,
        layers,
        replace(SETTINGS, **changes),
        accelerator=new_accelerator("cpu"),
        hooks=(norms, watched),
    )
    recorder = Recorder()
    list(trainer.train(some, some[:5], recorder))
    return watched, recorder


class Watched(Pruner):
    """A pruner that checks each of its calls against the restatement."""

    def __init__(
        self, stacked: Stack, layers: Any, settings: PruningSettings, norms: InputNorms, tokens: int
    ) -> None:
        super().__init__(stacked.blocks, layers, settings, norms=norms)
        self.norms = norms
        self.stacked, self.layers, self.settings = stacked, layers, settings
        self.start = parts(stacked, self.all())
        self.naive = Restated(stacked, self.start, settings, tokens)
        self.parameters = sum(value.size for value in self.start.values())
        self.prunings = self.resets = 0
        self.chosen: list[set[Any]] = []  # of each pruning, by block, module, letter and place
        self.dead: list[int] = []
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
        self.naive.smooth(parts(self.stacked, self.all()), parts(self.stacked, self.gradients))
        super().after_step(step)

    def _prune_(self, step: int) -> None:
        before = parts(self.stacked, self.all())
        masks = self.naive.chosen(before, self.norms)
        super()._prune_(step)
        after = parts(self.stacked, self.all())
        self.prunings += 1
        for key, mask in masks.items():
            assert np.array_equal(after[key][~mask], before[key][~mask]), key
            self._check_values(key, after[key][mask], mask, before[key].shape)
            self.resets += int(mask.sum())
        self.chosen.append(
            {(*key, place) for key, mask in masks.items() for place in np.flatnonzero(mask)}
        )
        pairs = {key[:2] for key in after}
        self.dead.append(
            sum(not any(after[(*pair, letter)].any() for letter in "AB") for pair in pairs)
        )

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
    plain = PruningSettings(
        importance=importance, unit="module", prune_threshold=Decimal(0), prune_value=value
    )
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
    threshold = Decimal(0) if unit == "module" else None
    settings = PruningSettings(
        importance=importance, unit=unit, prune_threshold=threshold, prune_value=value
    )
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
    kept = torch.cat([g.flatten() for both in pruner._scores.gradients.values() for g in both])
    assert float(kept.norm()) == pytest.approx(report.grad_norm, rel=1e-4)
    assert report.grad_norm > SETTINGS.max_grad_norm


def mean_importances(
    llama: str, adapters: list[Adapter], settings: PruningSettings, times: int = 1
) -> dict[tuple[str, str], float]:
    """Return the means on some records, each of them `times` times in the validation set."""
    base = open_base(llama)
    stacked = stack(adapters)
    layers = attach_stack(base, stacked, dropout=0.0)
    hooks = pruning_hooks(stacked.blocks, layers, settings)
    trainer = Trainer(base, layers, SETTINGS, accelerator=new_accelerator("cpu"), hooks=hooks)
    some = examples(base)
    trainer.begin(some, some * times, Recorder())
    pruner = hooks[-1]
    assert isinstance(pruner, Pruner)
    return pruner.mean_importances()


def test_a_threshold_means_the_same_for_a_larger_validation_set(
    llama: str, adapters: list[Adapter]
) -> None:
    settings = PruningSettings(unit="module", prune_threshold=Decimal(0))
    once, thrice = (mean_importances(llama, adapters, settings, times) for times in (1, 3))
    assert thrice == pytest.approx(once, rel=1e-5)


@pytest.mark.parametrize("importance", ["input", "magnitude"])
def test_the_mean_importance_includes_the_adapters_scale(
    llama: str, adapters: list[Adapter], importance: str
) -> None:
    settings = PruningSettings(unit="module", importance=importance, prune_threshold=Decimal(0))
    plain = mean_importances(llama, adapters, settings)
    louder = [
        replace(adapter, config={**adapter.config, "lora_alpha": 3 * adapter.config["lora_alpha"]})
        for adapter in adapters
    ]
    bottom = "model.layers.0."  # whose inputs no LoRA changes but that of its own layer
    means = mean_importances(llama, louder, settings)
    for pair, mean in plain.items():
        if importance == "magnitude" or pair[1].startswith(bottom + "self_attn"):
            assert means[pair] == pytest.approx(3 * mean, rel=1e-5), pair


def test_the_gradient_is_the_same_with_the_scale_folded_into_b(
    llama: str, adapters: list[Adapter]
) -> None:
    """Why it is not multiplied by the scale: w·∂L/∂w of s·B and scale 1 is that of B and s."""
    averages = []
    for folded in (False, True):
        base = open_base(llama)
        stacked = stack(adapters)
        if folded:
            blocks = tuple(
                replace(b, modules={n: replace(s, scale=1.0) for n, s in b.modules.items()})
                for b in stacked.blocks
            )
            stacked = Stack(fold(stacked.factors, stacked), blocks)
        layers = attach_stack(base, stacked, dropout=0.0)
        pruner = Pruner(stacked.blocks, layers, PruningSettings(Decimal("0.1"), "gradient"))
        trainer = Trainer(base, layers, replace(SETTINGS, lr=1e-12), hooks=(pruner,), **ON_CPU)
        some = examples(base)
        trainer.begin(some, some, Recorder())
        trainer._step(some[:4], 10)
        averages.append([t.flatten() for n, t in pruner.state().items() if n.startswith("sens")])
    plain, folded_in = (torch.cat(of_run) for of_run in averages)
    assert float(plain.abs().max()) > 0
    torch.testing.assert_close(folded_in, plain, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("unit", "every"), [("parameter", 1), ("parameter", 2), ("module", 1)])
def test_the_header_tells_the_share_at_the_reset_value(
    llama: str, adapters: list[Adapter], tmp_path: Path, value: str, unit: str, every: int
) -> None:
    merge_adaptively(
        adapters,
        open_base(llama),
        save_rows(tmp_path / "data", rows(10)),
        None,
        settings=SETTINGS,
        pruning=PruningSettings(Decimal("0.4"), unit=unit, prune_value=value, prune_every=every),
        output=str(tmp_path / "m"),
        reporter=Recorder(),
    )
    merged = load_adapter(str(tmp_path / "m"))
    shares, reset, total = [], 0.0, 0
    for block, row in zip(merged.header["blocks"], inspect_adapter(merged)["blocks"], strict=True):
        assert ("reset" in block) == (value != "zero")
        assert row.get("reset") == block.get("reset")
        share = block.get("reset", block["zeros"])
        shares.append(share)
        reset += share * row["parameters"]
        total += row["parameters"]
        if unit == "parameter":
            sizes = [size for pair in _pair_sizes(merged, block) for size in pair]
            wanted = sum(int(Decimal("0.4") * size) for size in sizes) / sum(sizes)
            assert share == pytest.approx(wanted)
    assert 0 < reset / total <= 0.4
    assert max(shares) > 0.2


def _pair_sizes(merged: Adapter, block: Any) -> list[tuple[int, int]]:
    shapes = {module.name: module.shape for module in merged.modules()}
    return [
        (part["rank"] * shapes[name][1], part["rank"] * shapes[name][0])
        for name, part in block["modules"].items()
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"prune_every": "epoch"},
        {"prune_every": 2, "importance": "gradient"},
        {"group": "all"},
        {"unit": "module", "group": "adapter", "prune_value": "reinit"},
    ],
    ids=str,
)
def test_a_killed_merge_goes_on_to_the_same_bytes(
    llama: str,
    adapters: list[Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    data = save_rows(tmp_path / "data", rows(10))
    save = Checkpoint.save

    def stop(self: Checkpoint, trainer: Trainer) -> None:
        save(self, trainer)
        raise KeyboardInterrupt

    def merge(name: str, resume: bool = False) -> bytes:
        merge_adaptively(
            adapters,
            open_base(llama),
            data,
            None,
            settings=replace(SETTINGS, keep="last"),
            pruning=replace(PruningSettings(Decimal("0.3")), **changes),
            output=str(tmp_path / f"{name}.safetensors"),
            reporter=Recorder(),
            resume=resume,
        )
        return (tmp_path / f"{name}.safetensors").read_bytes()

    whole = merge("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            merge("broken")
    assert merge("broken", resume=True) == whole
    told = load_adapter(str(tmp_path / "whole.safetensors")).header["history"][-1]["settings"]
    assert {name: told[name] for name in changes} == changes
    assert told["keep"] == "last"
    assert "patience" not in told


def test_settings_at_their_defaults_are_not_recorded() -> None:
    recorded = {**PruningSettings().history_fields(), **TrainingSettings().history_fields()}
    assert recorded.keys() & {"group", "prune_every", "keep"} == set()
    assert recorded["patience"] == 3
