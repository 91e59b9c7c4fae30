"""Runs that are stopped at random moments, again and again, end in the bytes of unbroken ones."""

from __future__ import annotations

import _thread
import json
import os
import random
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from lorakit.cli import lorakit
from lorakit.runs.resume import SavedValues
from lorakit.runs.signals import Terminated, terminating
from tests.support.training_data import rows, save_rows

TRAINING = "--data train.jsonl --val val.jsonl --epochs 3 --batch-size 4 --device cpu --dropout 0.1"
MERGE = f"merge a.safetensors b.safetensors {TRAINING} --checkpoint-every 2"
BOUNDARY = "find-boundary a.safetensors --data val.jsonl --device cpu --batch-size 3"
RUNS = {
    "train-adapter": f"train-adapter --model llama {TRAINING} --checkpoint-every 2",
    "merge": f"{MERGE} --prune-ratio 0.3 --calibrate-every 2",
    "merge by gradient": f"{MERGE} --prune-ratio 0.3 --importance gradient --keep last",
    "merge by a metric": f"{MERGE} --prune-ratio 0.3 --select-by rouge1 --max-new-tokens 4",
    "a grid": f"{MERGE} --prune-ratio 0,0.3 --prune-value reinit",
    "auto": f"{MERGE} --prune-ratio auto",
    "auto thresholds": f"{MERGE} --unit module --prune-threshold auto",
    "learned-weights": f"{MERGE} --method learned-weights",
    "lorahub": "merge a.safetensors b.safetensors --data val.jsonl --method lorahub --device cpu",
    "find-boundary": f"{BOUNDARY} --max-new-tokens 6",
    "find-boundary by loss": "find-boundary a.safetensors --data train.jsonl --device cpu "
    "--batch-size 1 --metric loss --factors 0,0.5",
    "find-boundary by probability": f"{BOUNDARY} --by probability --compare 1-2",
    "importance": "inspect a.safetensors --importance --data train.jsonl --device cpu",
    "generate": "generate a.safetensors --data train.jsonl --device cpu --batch-size 3 "
    "--max-new-tokens 6",
    "bertscore": "score said.jsonl --metric bertscore,rougeL --bertscore-model bert",
    "build-dataset": "build-dataset jsonl train.jsonl --template {{prompt}} "
    "--completion {{completion}} --sample 15",
}
# A signal can come while Python clears something up, where it can only be reported.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def folder(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two models, two adapters and records, in which the commands above run."""
    from tests.scoring.test_bertscore import save_encoder

    folder = tmp_path_factory.mktemp("runs")
    (folder / "llama").symlink_to(llama)
    (folder / "bert").mkdir()
    save_encoder(folder / "bert")
    save_rows(folder / "train.jsonl", rows(22))
    save_rows(folder / "val.jsonl", rows(7, seed=1))
    words = ["cat sat", "dog ran .", "the mat"]
    said = ({"prediction": words[n % 3], "references": [words[n % 2]]} for n in range(150))
    save_rows(folder / "said.jsonl", said)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, name in enumerate("ab"):
            run(
                f"train-adapter --model llama {TRAINING} --lr 0.02 --seed {seed}",
                f"{name}.safetensors",
            )
    return folder


def run(command: str, output: str, *options: str) -> None:
    lorakit.main([*shlex.split(command), "-q", "-o", output, *options], standalone_mode=False)


def suffix(command: str) -> str:
    return ".safetensors" if command.startswith(("train", "merge")) else ".jsonl"


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Interrupt the block after a time, as Ctrl-C does, unless it has ended."""
    timer = threading.Timer(seconds, _thread.interrupt_main)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def stop_again_and_again(command: str, output: Path, delays: Sequence[float]) -> int:
    """Run a command, stop it after each of the delays, then let it end; return the stops."""
    stops = 0
    for delay in delays:
        try:
            with interrupted_after(delay):
                run(command, str(output), *(["--resume"] if stops else []))
        except (click.Abort, KeyboardInterrupt):
            stops += 1
        if output.exists():
            return stops
    run(command, str(output), *(["--resume"] if stops else []))
    return stops


def check_bytes(name: str, tmp_path: Path, *, rounds: int, stops: int) -> None:
    """Run a command of RUNS unbroken, and in each round stopped so often; compare the bytes."""
    command = RUNS[name]
    output = f"out{suffix(command)}"
    run(command, str(tmp_path / output))
    started = time.perf_counter()
    run(command, str(tmp_path / output))
    lasts = time.perf_counter() - started
    draw = random.Random(name)
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        delays = [draw.uniform(0, lasts) for _ in range(stops)]
        stop_again_and_again(command, folder / output, delays)
        assert (folder / output).read_bytes() == (tmp_path / output).read_bytes()
        assert [path.name for path in folder.iterdir()] == [output]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_at_a_random_moment_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder)
    check_bytes(name, tmp_path, rounds=1, stops=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_stopped_at_thirty_random_moments_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder)
    check_bytes(name, tmp_path, rounds=10, stops=3)


# — that what was done is not done again —


def interrupting(
    function: Callable[..., object], calls: int, number: signal.Signals = signal.SIGINT
) -> Callable[..., object]:
    """Return a function that raises a signal within the call of that number, after its work."""
    count = 0

    def call(*arguments: object, **options: object) -> object:
        nonlocal count
        result = function(*arguments, **options)
        count += 1
        if count == calls:
            signal.raise_signal(number)
        return result

    return call


SAVING = ["lorahub", "find-boundary", "find-boundary by loss", "find-boundary by probability"]


@pytest.mark.parametrize("name", [*SAVING, "bertscore"])
def test_a_resumed_run_computes_only_what_is_left(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder)
    command = RUNS[name]
    whole, broken = (tmp_path / f"{kind}{suffix(command)}" for kind in ("whole", "broken"))
    added: list[object] = []
    add = SavedValues.add

    def count(self: SavedValues, *arguments: object) -> None:
        added.append(arguments)
        add(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(SavedValues, "add", count)
    run(command, str(whole))
    needed = len(added)
    assert needed > 2
    with monkeypatch.context() as patch:
        patch.setattr(SavedValues, "add", interrupting(count, needed - 1))
        with pytest.raises(click.Abort):
            run(command, str(broken))
    added.clear()
    run(command, str(broken), "--resume")
    assert len(added) == 1
    assert broken.read_bytes() == whole.read_bytes()


WITH_SIDE_FILES = ["train-adapter", "a grid", "lorahub", "find-boundary", "importance", "bertscore"]


@pytest.mark.parametrize("name", WITH_SIDE_FILES)
def test_a_run_stopped_as_its_output_gets_its_name_leaves_the_output_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder)
    command = RUNS[name]
    output = tmp_path / f"out{suffix(command)}"
    replace = os.replace

    def then_stop(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target) == output:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", then_stop)
    with pytest.raises(click.Abort):
        run(command, str(output))
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def step_entries(log: Path) -> list[dict[str, object]]:
    """Return what a log says of steps, but for how fast they were."""
    entries = (json.loads(line) for line in log.read_text().splitlines())
    return [{**entry, "tokens_per_second": None} for entry in entries if "lr" in entry]


@pytest.mark.parametrize("name", ["train-adapter", "merge", "merge by gradient", "learned-weights"])
@pytest.mark.parametrize("steps", [4, 8, 12])
def test_a_run_stopped_within_an_epoch_goes_on_from_its_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, steps: int
) -> None:
    from lorakit.training.trainer import Trainer

    monkeypatch.chdir(folder)
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    command = RUNS[name].replace("--checkpoint-every 2", "")
    run(command, str(whole), "--log", str(tmp_path / "unbroken"))
    step = Trainer._step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupting(step, steps))
        with pytest.raises(click.Abort):
            run(command, str(broken))
    log = tmp_path / "log"
    run(command, str(broken), "--resume", "--log", str(log))
    assert step_entries(log) == step_entries(tmp_path / "unbroken")[steps:]
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_a_terminated_training_leaves_its_last_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    from lorakit.training.trainer import Trainer

    monkeypatch.chdir(folder)
    command = f"train-adapter --model llama {TRAINING}"
    run(command, str(tmp_path / "whole.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupting(Trainer._step, 3, number))
        with pytest.raises(Terminated), terminating():
            run(command, str(tmp_path / "broken.safetensors"))
    assert [path.name for path in tmp_path.glob("*broken*")] == ["broken.safetensors.resume"]
    run(command, str(tmp_path / "broken.safetensors"), "--resume")
    whole, broken = (tmp_path / f"{name}.safetensors" for name in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()


def test_checkpoints_come_after_every_so_many_steps_and_every_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.training.checkpoint import Checkpoint
    from lorakit.training.trainer import Trainer

    monkeypatch.chdir(folder)
    steps: list[int] = []

    def save(self: Checkpoint, trainer: Trainer) -> None:
        steps.append(trainer.progress.step)

    monkeypatch.setattr(Checkpoint, "save", save)
    command = f"train-adapter --model llama {TRAINING} --checkpoint-every 4"
    run(command, str(tmp_path / "a.safetensors"))
    assert steps == [4, 6, 8, 12, 16, 18]
