"""`--dry-run` against the runs that it foretells: lengths, steps, parameters, memory, errors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.storage import load_adapter
from lorakit.boundary import decode, evaluate
from lorakit.boundary.decode import Pool
from lorakit.commands import _dry_run
from lorakit.commands._dry_run import duration
from lorakit.files import size
from lorakit.merging import plan as merging_plan
from lorakit.models.prefixes import KeysAndValues
from lorakit.models.reading import Reader
from lorakit.training import train
from lorakit.training.trainer import Trainer
from tests.support.in_process import Ended, run_here
from tests.support.models import save_model
from tests.support.program import PROGRAM, run_over
from tests.support.training_data import rows, save_rows
from tests.test_pipes import llama_adapter

Rows = list[dict[str, Any]]
HERE = ("--device", "cpu", "--dtype", "float32")
FEW = ("--epochs", "2", "--batch-size", "4", *HERE)


@pytest.fixture
def folder(tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: records to train and validate on, and two adapters of the Llama."""
    save_rows(tmp_path / "train.jsonl", rows(10))
    save_rows(tmp_path / "val.jsonl", rows(4, seed=1))
    for seed, name in enumerate("ab"):
        llama_adapter(tmp_path / f"{name}.safetensors", seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAKIT_MODEL", llama)
    return tmp_path


def rows_of(done: Ended) -> Rows:
    assert done.code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def plan(*arguments: str) -> Rows:
    """Return what a command says it would do."""
    return rows_of(run_here(*arguments, "--dry-run"))


def section(said: Rows, name: str, of: str | None = None) -> dict[str, Any]:
    (row,) = [row for row in said if row["section"] == name and row.get("of") == of]
    return row


TRAIN = ("train-adapter", "--data", "train.jsonl", "--val", "val.jsonl", *FEW)
MERGE = ("merge", "a.safetensors", "b.safetensors", *TRAIN[1:])
FIND = ("find-boundary", "a.safetensors", "--data", "val.jsonl", *HERE, "--max-new-tokens", "5")
GENERATE = ("generate", "a.safetensors", "--data", "val.jsonl", *HERE, "--max-new-tokens", "5")
SERVED = ("--endpoint", "http://localhost/v1", "--served-model", "m")
LORAHUB = ("merge", "a.safetensors", "b.safetensors", "--data", "train.jsonl")
COMMANDS = {
    "train-adapter": TRAIN,
    "merge": (*MERGE, "--prune-ratio", "0.1"),
    "merge auto": (*MERGE, "--prune-ratio", "auto"),
    "learned-weights": (*MERGE, "--method", "learned-weights"),
    "lorahub": (*LORAHUB, "--method", "lorahub"),
    "find-boundary": FIND,
    "find-boundary by loss": (*FIND, "--metric", "loss"),
    "find-boundary by probability": (*FIND[:8], "--by", "probability"),
    "generate": GENERATE,
    "generate zero-shot": ("generate", *GENERATE[2:]),
}


# — nothing but words —


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_says_everything_and_writes_nothing(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    said = plan(*COMMANDS[name])
    named = dict.fromkeys(row["section"] for row in said)
    work = (
        "steps" if name in ("train-adapter", "merge", "merge auto", "learned-weights") else "work"
    )
    assert list(named) == ["lengths", "cut", work, "parameters", "memory"]
    parts = {row["of"]: row["bytes"] for row in said if row["section"] == "memory"}
    assert max(parts.values()) == parts["peak"]
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before


def test_an_output_that_another_run_writes_is_no_obstacle(folder: Path) -> None:
    (folder / "out.safetensors").write_text("mine")
    (folder / ".out.safetensors.lock").write_text(json.dumps([os.getppid(), "elsewhere", "x"]))
    plan(*TRAIN, "-o", "out.safetensors")
    assert (folder / "out.safetensors").read_text() == "mine"


def test_a_base_without_weights_will_do(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_model(base)
    (base / "model.safetensors").unlink()
    said = plan(*TRAIN, "--model", str(base))
    assert section(said, "parameters")["total"] > 20_000
    done = run_here(*TRAIN, "--model", str(base), "--dry-run", "--measure")
    assert done.code == 1
    assert [json.loads(line)["section"] for line in done.stdout.splitlines()][-1] == "memory"
    assert len(done.errors) == 1


def test_a_gpu_need_not_be_here_and_takes_bfloat16(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    said = plan(*TRAIN[:5], "--device", "cuda")
    assert "bfloat16" in section(said, "memory", "base weights")["remark"]
    assert "on cuda" in section(said, "memory", "peak")["remark"]


# — against the real run —


@pytest.mark.parametrize(
    ("options", "trained"),
    [(TRAIN, 3 * 2), (MERGE, 3), ((*MERGE, "--prune-ratio", "0.1,0.2"), 3)],
    ids=["train-adapter", "merge", "two ratios"],
)
def test_steps_and_parameters_are_those_of_the_run(
    options: tuple[str, ...], trained: int, folder: Path
) -> None:
    said = plan(*options)
    done = run_here(*options, "-o", "out.safetensors", "--log", "log.jsonl", "-q")
    assert done.code == 0, done.stderr
    log = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert sum("grad_norm" in entry for entry in log) == section(said, "steps")["steps"]
    adapter = load_adapter("out.safetensors")
    written = sum(module.rank * sum(module.shape) for module in adapter.modules())
    assert written == section(said, "parameters")["trainable"]
    assert len(adapter.modules()) == trained


def test_early_stopping_is_the_most_a_run_can_fall_short_by(folder: Path) -> None:
    assert section(plan(*TRAIN), "steps")["patience"] == 3
    assert section(plan(*TRAIN, "--keep", "last"), "steps")["patience"] is None
    searched = section(plan(*MERGE, "--prune-ratio", "auto"), "steps")
    assert searched["steps"] == int(4.5 * 2 * searched["steps_an_epoch"])


def test_weights_and_optimiser_take_what_the_trainers_tensors_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = []

    class Watched(Trainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            trainers.append(self)

    options = ("--model", "tiny", "--rank", "3", "--target-modules", "all-linear")
    said = plan(*TRAIN, *options)
    monkeypatch.setattr(train, "Trainer", Watched)
    assert run_here(*TRAIN, *options, "-q").code == 0
    (trainer,) = trainers
    frozen = [p for p in trainer.base.model.parameters() if not p.requires_grad]
    assert section(said, "memory", "base weights")["bytes"] == sum(p.nbytes for p in frozen)
    lora = sum(parameter.nbytes for parameter in trainer.parameters)
    assert section(said, "memory", "LoRA")["bytes"] == lora
    assert section(said, "memory", "gradients")["bytes"] == lora
    moments = sum(
        state[name].nbytes
        for state in trainer.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    )
    assert section(said, "memory", "optimiser")["bytes"] == moments


def bytes_of(layers: Mapping[int, KeysAndValues]) -> int:
    return sum(part.nbytes for parts in layers.values() for part in parts)


def test_the_slots_of_a_search_take_what_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    class Watched(Reader):
        def _logits(self, *arguments: Any) -> Any:
            logits = super()._logits(*arguments)
            held.append(bytes_of(self.cache._stored))
            return logits

    said = plan(*FIND)
    monkeypatch.setattr(decode, "Reader", Watched)
    assert run_here(*FIND, "-q").code == 0
    assert section(said, "memory", "cache")["bytes"] == held[-1]
    assert section(said, "work")["boundaries"] == 4  # the base and three layers
    assert section(said, "work")["outputs"] == 4 * 4


@pytest.mark.parametrize("rows_at_once", ["16", "2", "1"])
def test_what_prompts_begin_with_takes_what_is_said_but_no_more_than_the_slots(
    rows_at_once: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = [{**row, "prompt": f"All prompts begin so. {row['prompt']}"} for row in rows(4, seed=1)]
    save_rows(folder / "val.jsonl", val)
    pools = []

    class Watched(Pool):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            pools.append(self)

    monkeypatch.setattr(evaluate, "Pool", Watched)
    command = (*FIND, "--batch-size", rows_at_once)
    said = plan(*command)
    assert run_here(*command, "-q").code == 0
    taken = section(said, "memory", "prefixes")["bytes"]
    (pool,) = pools
    assert taken == sum(bytes_of(prefix.layers) for prefix in pool._prefixes.values()) > 0
    slots = section(said, "memory", "cache")["bytes"]
    assert taken <= slots
    if rows_at_once == "1":
        assert len(pool._prefixes) < 4, "there is room for all"


@pytest.mark.parametrize("records", [4, 8])
def test_the_time_of_lorahub_is_that_of_all_records(
    records: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging_plan, "timed", lambda act: 1.0)
    row = rows(1)[0]
    save_rows(folder / "train.jsonl", [{**row, "id": str(n)} for n in range(records)])
    options = ("--method", "lorahub", "--measure", "--micro-batch-tokens", "1", *HERE)
    said = plan(*LORAHUB, *options)
    assert section(said, "time", "evaluation")["seconds"] == records  # one at a time


def test_a_metric_that_decides_needs_a_cache_in_place_of_activations(folder: Path) -> None:
    said = plan(*TRAIN, "--select-by", "rougeL", "--max-new-tokens", "90")
    parts = {row["of"]: row["bytes"] for row in said if row["section"] == "memory"}
    training = parts["activations"] + parts["logits"]
    generating = parts["cache"] + parts["reading prompts"]
    lasting = sum(parts[of] for of in ("base weights", "LoRA", "gradients", "optimiser"))
    assert parts["peak"] == lasting + max(training, generating)
    assert "cache" not in {row.get("of") for row in plan(*TRAIN)}


def test_generate_counts_its_batches_and_the_cache_of_the_largest(folder: Path) -> None:
    options = ("--batch-size", "3", "--temperature", "1", "--samples", "2")
    said = plan(*GENERATE, *options)
    assert section(said, "work")["batches"] == 3  # of eight rows
    assert section(said, "work")["outputs"] == 8
    prompts = [len(row["prompt"]) + 1 for row in rows(4, seed=1)]
    widths = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    assert section(said, "memory", "cache")["bytes"] == 3 * (max(prompts) + 5) * widths


@pytest.mark.slow
def test_of_several_processes_the_first_says_it(folder: Path) -> None:
    done = run_over(2, *TRAIN, "--dry-run")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert section(said, "steps")["steps"] == 6


def test_lengths_are_those_of_the_encoder(folder: Path) -> None:
    said = plan(*TRAIN)
    shown = run_here("show", "train.jsonl", "--n", "100").stdout
    assert shown  # the same records can be read
    records = [*rows(10), *rows(4, seed=1)]
    # a byte is a token here, and each text begins, and each completion ends, with one more
    prompts = [len(record["prompt"].encode()) + 1 for record in records]
    completions = [len(record["completion"].encode()) + 1 for record in records]
    for of, lengths in (("prompts", prompts), ("completions", completions)):
        row = section(said, "lengths", of)
        assert (row["least"], row["most"]) == (min(lengths), max(lengths))
        assert row["median"] == sorted(lengths)[6]
        for part in row["bins"]:
            within = [part["from"] <= length <= part["to"] for length in lengths]
            assert sum(within) == part["records"]
        assert sum(part["records"] for part in row["bins"]) == len(records)


# — what cannot be used —


def test_records_too_long_are_counted_before_the_runs_own_error(folder: Path) -> None:
    long = {"id": "x", "prompt": "w" * 90, "completion": " y"}
    save_rows(folder / "train.jsonl", [*rows(3), {**long, "prompt": "w" * 70}, long])
    options = (*TRAIN, "--max-length", "60")
    done, run = run_here(*options, "--dry-run"), run_here(*options)
    assert (done.code, run.code) == (1, 1)
    assert done.errors == run.errors
    assert "train.jsonl:4" in done.errors[0]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    cut = section(said, "cut")
    assert (cut["too_long"], cut["limit"], cut["records"]) == (2, 60, 9)
    assert cut["share"] == round(2 / 9, 4)
    assert cut["longest"] == [
        {"where": "train.jsonl:5", "tokens": 94},
        {"where": "train.jsonl:4", "tokens": 74},
    ]


def test_what_truncate_would_cut_is_reported(folder: Path) -> None:
    save_rows(folder / "train.jsonl", [*rows(3), {"prompt": "w" * 90, "completion": " y"}])
    cut = section(plan(*TRAIN, "--max-length", "60", "--truncate"), "cut")
    lengths = [
        len(row["prompt"]) + len(row["completion"]) + 2 for row in [*rows(3), *rows(4, seed=1)]
    ]
    assert cut["too_long"] == 1
    assert cut["tokens_cut"] == round((94 - 60) / (94 + sum(lengths)), 4)


@pytest.mark.parametrize("name", ["train-adapter", "merge", "find-boundary", "generate"])
@pytest.mark.parametrize(
    "line",
    ['{"prompt": 1}', "nothing", '{"completion": " a"}', ""],
    ids=["type", "syntax", "field", "empty"],
)
def test_a_file_that_cannot_be_used_is_the_runs_own_error(
    name: str, line: str, folder: Path
) -> None:
    for path in ("train.jsonl", "val.jsonl"):
        (folder / path).write_text(line + "\n")
    done, run = run_here(*COMMANDS[name], "--dry-run"), run_here(*COMMANDS[name])
    assert (done.code, run.code) == (1, 1)
    assert len(done.errors) == 1
    assert done.errors == run.errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*TRAIN, "--measure"), "--measure is for --dry-run only."),
        ((*GENERATE, "--format", "json"), "--format is for --dry-run only."),
        (
            ("merge", "a.safetensors", "b.safetensors", "--method", "ties", "--dry-run"),
            "--dry-run does not belong to --method ties",
        ),
        (
            ("generate", *GENERATE[2:4], *SERVED, "--dry-run"),
            "--dry-run is for a base that is loaded, not --endpoint.",
        ),
    ],
    ids=["measure", "format", "static merge", "endpoint"],
)
def test_options_that_have_no_effect_are_refused(
    options: tuple[str, ...], said: str, folder: Path
) -> None:
    done = run_here(*options)
    assert done.code == 2
    assert said in done.stderr


# — time, and the table —


@pytest.mark.parametrize("name", COMMANDS)
def test_a_measured_step_says_on_what_and_for_how_long(name: str, folder: Path) -> None:
    said = plan(*COMMANDS[name], "--measure")
    first, *_, last = [row for row in said if row["section"] == "time"]
    assert first["remark"].startswith("measured on cpu")
    assert last["remark"].startswith("extrapolated to")
    assert 0 < first["seconds"] <= last["seconds"]
    assert sorted(os.listdir()) == ["a.safetensors", "b.safetensors", "train.jsonl", "val.jsonl"]


def test_a_table_shows_the_same(folder: Path) -> None:
    said = plan(*TRAIN)
    table = run_here(*TRAIN, "--dry-run", "--format", "table").stdout.decode().splitlines()
    cells = [line.split() for line in table]
    assert ["steps", "an", "epoch", str(section(said, "steps")["steps_an_epoch"])] in cells
    prompts = section(said, "lengths", "prompts")
    assert ["prompts", *(str(prompts[name]) for name in _dry_run._COLUMNS)] in cells
    assert sum(line.endswith("█") for line in map(str.rstrip, table)) > 3
    (peak,) = [line for line in table if line.startswith("peak")]
    assert size(section(said, "memory", "peak")["bytes"]) in peak


def test_a_terminal_gets_a_table(folder: Path) -> None:
    done = in_a_terminal([PROGRAM, *GENERATE, "--dry-run"])
    assert "tokens of" in done
    assert '"section"' not in done


def in_a_terminal(command: list[str]) -> str:
    """Run a command whose stdout is a terminal; return what it wrote there."""
    import pty
    import subprocess

    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL):
        os.close(theirs)
        text = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux, where the other end is closed
                break
            if not part:
                break
            text += part
    os.close(ours)
    return text.decode()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.1234, "0.123 s"), (119, "119 s"), (600, "10.0 min"), (7200, "2.0 h")]
)
def test_times_are_in_a_unit_that_can_be_read(seconds: float, text: str) -> None:
    assert duration(seconds) == text
