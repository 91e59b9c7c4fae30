"""The search by loss as a whole: records, notes, the command, and stripping what it chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import layer_of
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.boundary.choice import Sweep
from lorakit.boundary.cuts import BASE, Point, bottom
from lorakit.boundary.gates import Gates
from lorakit.boundary.layerwise import read_alone
from lorakit.boundary.loss import evaluate_loss, losses_under
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.lora import attach
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.records.record import Record
from lorakit.settings import BoundarySettings, TrainingSettings
from lorakit.training.loss import BatchLoss
from tests.support.boundary_models import SETTINGS, Notes, random_adapter
from tests.support.in_process import run_here
from tests.support.models import LAYERS, open_base
from tests.support.training_data import rows, save_rows

EVERY = list(range(LAYERS + 1))


@pytest.fixture
def data(tmp_path: Path) -> str:
    return save_rows(tmp_path / "val.jsonl", rows(8))


def look(
    base: Base, adapter: Adapter, data: str, notes: Notes | None = None, **settings: Any
) -> Sweep:
    chosen = BoundarySettings(metric="loss", **settings)
    reporter = notes or Notes()
    return evaluate_loss(
        base, adapter, data, settings=chosen, generation=SETTINGS, reporter=reporter
    )


def examples_of(base: Base, count: int) -> list[Example]:
    encoder = base.encoder(chat="off")
    return [encoder.example(Record(row, row["id"])) for row in rows(count)]


def test_the_loss_is_that_of_training(llama: str, data: str) -> None:
    base = open_base(llama)
    sweep = look(base, random_adapter(base), data)
    for k in EVERY:
        stripped = random_adapter(base, below=k) if k else None
        alone = open_base(llama)
        if stripped is not None:
            attach(alone, stripped)
        loss = BatchLoss(
            alone,
            [],
            tokens=TrainingSettings.micro_batch_tokens,
            accelerator=new_accelerator("cpu"),
        )
        assert sweep.scores[Point(k)] == pytest.approx(loss.mean(examples_of(alone, 8)), rel=1e-5)


@pytest.mark.parametrize("name", ["tiny", "stories260K"])
def test_real_models_have_the_losses_of_their_own_passes(name: str, shared: Path) -> None:
    base = open_base(name if name == "tiny" else str(shared / "models" / name))
    adapter, examples = random_adapter(base, size=0.3), examples_of(base, 6)
    cuts = [bottom(k, base.layers) for k in range(base.layers, -1, -1)]
    notes = Notes()
    sums = losses_under(base, adapter, examples, {cut: cut for cut in cuts}, 2, notes)
    assert notes.notes == []
    with Gates(attach(base, adapter)).standing() as gates:
        for losses in read_alone(base, gates, examples, cuts):
            expected = losses.sums.tolist()
            assert sums[losses.cut] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_records_need_completions(llama: str, tmp_path: Path) -> None:
    base, bare = open_base(llama), save_rows(tmp_path / "bare.jsonl", [{"prompt": "a"}])
    with pytest.raises(LorakitError, match=r"bare.jsonl:1: .*completion"):
        look(base, random_adapter(base), bare)


def test_the_sample_does_not_depend_on_how_it_is_batched(llama: str, data: str) -> None:
    base, examples = open_base(llama), examples_of(open_base(llama), 8)
    cuts = {k: bottom(k, LAYERS) for k in EVERY}
    small, large = (
        losses_under(base, random_adapter(base), examples, cuts, size, Notes()) for size in (1, 64)
    )
    for k in EVERY:
        assert small[k] == pytest.approx(large[k], rel=1e-5)


def test_the_notes_compare_with_the_base_and_the_whole_adapter(llama: str, data: str) -> None:
    base, notes = open_base(llama), Notes()
    sweep = look(base, random_adapter(base), data, notes)
    assert notes.notes == sweep.notes
    assert f"(boundary 0) scores {sweep.scores[BASE]:.3f} loss" in notes.notes[0]


def test_every_factor_has_a_record_and_one_of_all_is_the_best(llama: str, data: str) -> None:
    base = open_base(llama)
    records = look(base, random_adapter(base), data, factors=(0.0, 0.5)).as_records()
    points = [(record["boundary"], record["factor"]) for record in records]
    assert points == [(k, factor) for k in EVERY[1:] for factor in (0.0, 0.5)]
    assert sum(record["best"] for record in records) == 1
    assert records[-1]["score"] == records[-2]["score"], "nothing is left to scale"
    plain = look(base, random_adapter(base), data).as_records()
    assert [record["score"] for record in records[::2]] == [record["score"] for record in plain]


def test_one_standard_error_needs_two_records(llama: str, data: str) -> None:
    base = open_base(llama)
    with pytest.raises(LorakitError, match="two records or more"):
        look(base, random_adapter(base), data, sample=1, rule="1se")
    assert "standard_error" not in look(base, random_adapter(base), data, sample=1).as_records()[0]


def test_the_command_chooses_layers_that_strip_layers_keeps(
    llama: str, data: str, tmp_path: Path
) -> None:
    path = save_adapter(random_adapter(open_base(llama)), str(tmp_path / "a.safetensors"))
    plot, output = tmp_path / "loss.svg", str(tmp_path / "cut.safetensors")
    found = run_here(
        *("find-boundary", path, "--data", data, "--model", llama, "--metric", "loss"),
        *("--keep", "top", "--rule", "1se", "--boundaries", "1-2", "--plot", str(plot)),
    )
    assert found.code == 0, found.stderr
    records = [json.loads(line) for line in found.text.splitlines()]
    assert [record["layers"] for record in records] == [[2], [1, 2]]
    assert all(record["standard_error"] >= 0 for record in records)
    assert "reading: 3 of 3, 0 s left" in found.stderr
    assert (tmp_path / "loss.svg.jsonl").read_text() == found.text
    chosen = tmp_path / "records.jsonl"
    chosen.write_text(found.text)
    stripped = run_here("strip-layers", path, "--boundary", str(chosen), "-o", output)
    assert stripped.code == 0, stripped.stderr
    (best,) = (record for record in records if record["best"])
    layers = {layer_of(module.name) for module in load_adapter(output).modules()}
    assert layers == set(best["layers"])
