"""Every benchmark runs everywhere: with its smallest sizes, through the code of its full ones."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.records.few_shot import NO_EXAMPLES
from lorakit.settings import GenerationSettings
from tests.benchmarks import __main__ as program
from tests.benchmarks import find_boundary, generate, gpu, growth
from tests.benchmarks.commands import Cost, compared, cost_of
from tests.benchmarks.gpu_parts import random_records
from tests.benchmarks.growth_works import WORKS
from tests.benchmarks.machine import describe_machine, matrix_rate
from tests.benchmarks.program import data_folder, results_of
from tests.benchmarks.result import BenchmarkError, Result
from tests.benchmarks.rounds import Memory, all_in_turns, in_turns, ratio_of, timed
from tests.benchmarks.shapes import LLAMA_8B, SMALL, random_base
from tests.benchmarks.side import in_process
from tests.benchmarks.steps import padded, random_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", program.BENCHMARKS)
def test_a_benchmark_has_options_a_smallest_size_and_a_measure(name: str) -> None:
    module = importlib.import_module(f"tests.benchmarks.{name}")
    assert dataclasses.is_dataclass(module.Options())
    assert module.Options() != module.SMOKE
    assert isinstance(module.SMOKE, module.Options)
    assert callable(module.measure)


@pytest.mark.parametrize("name", ["boundary_loss", "batch_rows", "generate"])
def test_a_benchmark_gives_a_line_of_json_and_one_to_read(name: str) -> None:
    module = importlib.import_module(f"tests.benchmarks.{name}")
    (result,) = results_of(module.measure(module.SMOKE))
    assert json.loads(result.as_json())["name"].split(":")[0] == name
    assert result.as_text().startswith(f"{name}: ")


def test_a_benchmark_may_have_several_results() -> None:
    machine = describe_machine(CPU, torch.float32)
    several = [Result("some: a", "s", 1.0, machine), Result("some: b", "s", 2.0, machine)]
    assert results_of(several) == several
    assert results_of(several[0]) == several[:1]


def test_batches_by_length_and_as_records_come_give_texts_in_the_records_order() -> None:
    base = random_base(SMALL, CPU, torch.float32)
    records = random_records(base, 5, 2, 9)
    settings = GenerationSettings(batch_size=2, max_new_tokens=6, chat="off")
    expected = [generate.by_lorakit(base, [record], settings, NO_EXAMPLES)[0] for record in records]
    for batches in (generate.SORTED, generate.AS_THEY_COME):
        texts = generate.by_transformers(base, records, settings, NO_EXAMPLES, batches)
        assert texts == expected


def test_examples_before_all_prompts_are_a_prefix_that_is_read_once() -> None:
    base = random_base(SMALL, CPU, torch.float32)
    prompts = [(1, 2, 3, 4), (1, 2, 5), (1, 2, 3)]
    assert find_boundary.shared_prefix(prompts) == 2
    head = base.model.get_output_embeddings().weight.numel()
    layers = SMALL.layer_weights * SMALL.layers
    assert generate.least_flops(base, prompts, 7) == 2.0 * (layers * (6 + 7) + head * 7)


def test_boundaries_differ_in_the_layers_above_them_alone() -> None:
    base = random_base(SMALL, CPU, torch.float32)
    top, below = SMALL.layers, SMALL.layers - 1
    prompts = [(1, 2, 3, 4), (1, 2, 5)]
    outputs = {(0, top): [7, 8], (1, top): [7], (0, below): [], (1, below): [9]}
    head = base.model.get_output_embeddings().weight.numel()
    through_all, through_one = (2 + 2) + (1 + 1) + 2, (2 + 0) + (1 + 1) + 2
    layered = SMALL.layer_weights * (through_all * SMALL.layers + through_one)
    least = find_boundary.least_flops(base, prompts, outputs)
    assert least == 2.0 * (layered + head * (3 + 2 + 1 + 2))


@pytest.mark.slow
def test_all_benchmarks_run_with_their_smallest_sizes(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    assert program.main(["--smoke", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    names = dict.fromkeys(record["name"].split(":")[0] for record in records)
    assert list(names) == list(program.BENCHMARKS)
    assert all(record["machine"]["dtype"] for record in records)
    compared = [record for record in records if record["peer"] is not None]
    assert len(compared) >= 12
    for record in compared:
        assert record["spread"][0] <= record["ratio"] <= record["spread"][1]


@pytest.mark.slow
def test_all_parts_for_a_gpu_run_on_the_cpu_with_small_shapes(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    assert gpu.main(["--smoke", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["part"] for record in records] == list(gpu.PARTS)
    steps = [record for record in records if record["unit"] == "s a step"]
    assert all(record["details"]["difference of the first loss"] < 1e-4 for record in steps)
    assert [r["details"]["texts that differ"] for r in records if r["part"] == "generate"] == [0]


def test_the_parts_for_a_gpu_end_within_ten_minutes() -> None:
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 600


def test_both_sides_of_every_part_agree_in_float32() -> None:
    record: Any = gpu.run("parity", "cpu", smoke=True)
    assert "error" not in record, record
    assert record["ours"] < 1e-4
    assert record["details"]["outputs of generate that differ"] == 0
    assert record["details"]["outputs of find-boundary that differ"] == 0


def test_a_part_that_fails_is_a_line_of_the_table() -> None:
    record: Any = gpu.run("parity", "nowhere", smoke=True)
    assert "nowhere" in record["error"]
    (line,) = gpu.table([record]).splitlines()[1:]
    assert line.startswith("parity")
    assert "error: " in line


def test_a_part_that_takes_too_long_is_stopped() -> None:
    started = time.perf_counter()
    with pytest.raises(BenchmarkError, match="sleeps took more than 1 s"):
        in_process(sleeps, {"seconds": 60}, limit=1)
    assert time.perf_counter() - started < 50


def sleeps(seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return {}


def test_growth_is_tabled_for_every_size_of_a_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lines.jsonl"
    growth.main(["static merge", "packing", "--smoke", "--out", str(out)])
    curves = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [(work, size) for work in ("static merge", "packing") for size in WORKS[work].growth]
    assert [(curve["work"], curve["size"]) for curve in curves] == expected
    assert capsys.readouterr().err.count("must ^") == len(expected)


@pytest.mark.slow
def test_the_growth_of_every_work_can_be_measured(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    assert growth.main(["--smoke", "--out", str(out)]) == 0
    lines = out.read_text().splitlines()
    assert len(lines) == sum(len(work.growth) for work in WORKS.values())


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_an_exponent_is_that_of_a_power(power: float) -> None:
    values = (1, 2, 4, 8, 16)
    assert growth.exponent(values, [3.0 * v**power for v in values]) == pytest.approx(power)


@pytest.mark.parametrize(
    ("must", "costs", "steep"),
    [
        pytest.param(1.0, (1.0, 2.0, 4.0, 8.0), False, id="as it must"),
        pytest.param(1.0, (1.0, 4.0, 16.0, 64.0), True, id="quadratic"),
        pytest.param(2.0, (1.0, 4.0, 16.0, 64.0), False, id="quadratic, as it must be"),
        pytest.param(1.0, (1e-4, 4e-4, 16e-4, 64e-4), False, id="too little to tell"),
    ],
)
def test_what_is_steeper_than_it_must_be_is_flagged(
    must: float, costs: tuple[float, ...], steep: bool
) -> None:
    curve = growth.Curve("work", "length", must, "", (1, 2, 4, 8), costs, (0.0,) * 4)
    assert curve.is_steep == steep
    assert ("STEEP" in growth.row(curve)) == steep


def test_memory_that_grows_too_fast_is_flagged_too() -> None:
    curve = growth.Curve("work", "layers", 1.0, "", (1, 2, 4), (1, 1, 1), (10.0, 40.0, 160.0))
    assert curve.is_steep


def test_sides_take_turns_and_begin_in_turns() -> None:
    calls: list[str] = []
    ours, theirs = in_turns(lambda: calls.append("ours"), lambda: calls.append("peer"), 3)
    assert calls == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert (len(ours), len(theirs)) == (3, 3)


def test_every_side_runs_in_every_round_and_in_reverse_in_every_other() -> None:
    calls: list[str] = []
    sides = {name: functools.partial(calls.append, name) for name in "abc"}
    results = all_in_turns(sides, 2)
    assert "".join(calls) == "abccba"
    assert {name: len(side) for name, side in results.items()} == {"a": 2, "b": 2, "c": 2}


def test_commands_are_compared_by_the_clock_and_in_processor_time() -> None:
    ours, peer = [Cost(1.0, 2.0), Cost(2.0, 2.0)], [Cost(3.0, 8.0), Cost(6.0, 8.0)]
    result = compared("some: thing", ours, peer, {"trials": 5})
    assert (result.ours, result.peer, result.ratio) == (1.0, 3.0, 3.0)
    assert (result.details["processor ratio"], result.details["trials"]) == (4.0, 5)


def test_a_command_that_fails_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r": no luck$"):
        cost_of([sys.executable, "-c", "raise SystemExit('no luck')"], os.environ, tmp_path)


def test_a_ratio_is_the_median_of_the_rounds_with_its_ends() -> None:
    ratio = ratio_of([1.0, 2.0, 1.0], [3.0, 4.0, 10.0])
    assert (ratio.median, ratio.spread) == (3.0, (2.0, 10.0))


def test_what_is_timed_is_returned_with_its_peak_of_memory() -> None:
    timing = timed(lambda: len(bytearray(64 << 20)), CPU)
    assert timing.output == 64 << 20
    assert timing.seconds > 0
    if Path("/proc/self/clear_refs").exists():
        assert 60 < timing.memory < 200
        assert Memory(CPU).peak() < 60, "the peak begins anew"


def test_a_result_without_a_peer_says_so_little() -> None:
    machine = describe_machine(CPU, torch.float32)
    result = Result("some", "s", 1.5, machine, limit="the disk", limit_share=0.5)
    assert result.as_text().splitlines()[0] == "some: 1.5 s, 50 % of the disk"
    assert machine.dtype == "float32"
    assert matrix_rate(CPU, torch.float32, size=64) > 0


def test_data_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DATA", str(tmp_path))
    with pytest.raises(BenchmarkError, match=r"there is no .*scitldr; set \$DATA"):
        data_folder("scitldr")
    (tmp_path / "scitldr").mkdir()
    assert data_folder("scitldr") == str(tmp_path / "scitldr")


def test_the_weights_of_a_shape_are_those_of_the_model() -> None:
    base = random_base(SMALL, CPU, torch.float32)
    layer = base.model.model.layers[0]
    weights = [w.numel() for w in layer.parameters() if w.dim() == 2]
    assert SMALL.layer_weights == sum(weights)
    all_learnt = 10 * (SMALL.layers * SMALL.layer_weights + SMALL.width * SMALL.words)
    assert SMALL.training_flops(10, 10) == 4 * all_learnt
    spared = 9 * (SMALL.layer_weights - SMALL.key_weights + SMALL.width * SMALL.words)
    assert SMALL.training_flops(10, 1) == 4 * (all_learnt - spared)
    whole = LLAMA_8B.layer_weights * LLAMA_8B.layers + 2 * LLAMA_8B.words * LLAMA_8B.width
    assert whole == pytest.approx(8.03e9, rel=1e-3)


def test_the_peers_batch_pads_on_the_right_and_labels_completions() -> None:
    rows = random_rows(3, 12, 4, 100, seed=0)
    batch = padded(rows, CPU)
    assert batch["input_ids"].shape == (3, 12)
    for place, row in enumerate(rows):
        labels = batch["labels"][place].tolist()
        assert [label for label in labels if label != -100] == list(row.ids[row.start :])
        assert batch["attention_mask"][place].sum() == len(row.ids)
