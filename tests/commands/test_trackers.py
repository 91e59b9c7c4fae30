"""What trackers hold of a run: the lines of its log, each once, however often it was resumed."""

from __future__ import annotations

import importlib.util
import json
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lorakit.commands._tracked import Point, TrackedRun, point_of
from lorakit.commands._trackers import TRACKERS, check_tracker
from lorakit.errors import LorakitError
from tests.support.program import PROGRAM, run, shell, wait_for
from tests.support.tracked import (
    ENTRY,
    Held,
    config_in_event_files,
    configs_in_sqlite,
    environment,
    epoch,
    held,
    report,
    step,
    wandb_records,
)

RUN = [step(1, turnover=0.5), step(2), epoch(1), step(3), step(4), epoch(2)]


def in_log(folder: Path) -> Held:
    """Return what the lines of the log hold, each line once, as a tracker names it."""
    values = Held()
    for line in dict.fromkeys((folder / "log").read_text(encoding="utf-8").splitlines()):
        fields: dict[str, Any] = json.loads(line)
        candidate, at = fields.pop("candidate", None), fields.pop("step")
        prefix = "" if candidate is None else f"{candidate}/"
        prefix += "epoch/" if "validation_loss" in fields else ""
        values.update((prefix + name, at, float(v)) for name, v in fields.items() if v is not None)
    return values


def rounded(values: Held) -> Held:
    """Return the values as event files hold them, in single precision."""
    single = struct.Struct("f")
    return Held(
        {(n, at, *single.unpack(single.pack(v))): count for (n, at, v), count in values.items()}
    )


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_holds_the_lines_of_the_log_and_stdout_nothing(
    tracker: str, tmp_path: Path
) -> None:
    done = report(tracker, tmp_path, RUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert len(in_log(tmp_path)) == 4 * 5 + 1 + 2 * 5
    assert rounded(held(tracker, tmp_path)) == rounded(in_log(tmp_path))


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_resumed_run_logs_no_step_twice(tracker: str, tmp_path: Path) -> None:
    # ended after step 3, with a checkpoint of the first epoch: the third step is taken again
    first = report(tracker, tmp_path, RUN[:4], error="stopped")
    assert "KeyboardInterrupt: stopped" in first.stderr
    second = report(tracker, tmp_path, RUN[3:], done=2, resume=True)
    assert second.returncode == 0, second.stderr
    assert max(held(tracker, tmp_path).values()) == 1
    assert rounded(held(tracker, tmp_path)) == rounded(in_log(tmp_path))


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_candidates_of_a_search_are_told_apart(tracker: str, tmp_path: Path) -> None:
    reports = [step(1, "0"), step(2, "0"), epoch(1, "0"), step(1, "0.1"), step(2, "0.1")]
    done = report(tracker, tmp_path, [*reports, epoch(1, "0.1")])
    assert done.returncode == 0, done.stderr
    values, lines = rounded(held(tracker, tmp_path)), rounded(in_log(tmp_path))
    assert ("0.1/train_loss", 2, 0.5) in lines
    assert ("0/epoch/validation_loss", 2, 0.25) in lines
    if tracker == "wandb":  # takes dots for paths
        lines = Held({(n.replace(".", "_"), at, v): count for (n, at, v), count in lines.items()})
    assert values == lines


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_resumed_search_logs_no_step_of_a_candidate_twice(tracker: str, tmp_path: Path) -> None:
    first = [step(1, "0"), step(2, "0"), epoch(1, "0"), step(1, "0.1")]
    report(tracker, tmp_path, first, error="stopped")
    again = [step(1, "0.1"), step(2, "0.1"), epoch(1, "0.1")]
    done = report(tracker, tmp_path, again, done=2, resume=True)
    assert done.returncode == 0, done.stderr
    assert max(held(tracker, tmp_path).values()) == 1
    assert rounded(held(tracker, tmp_path)) == rounded(in_log(tmp_path))


def test_a_run_that_begins_again_replaces_its_event_files(tmp_path: Path) -> None:
    for _ in range(2):
        report("tensorboard", tmp_path, RUN)
    assert max(held("tensorboard", tmp_path).values()) == 1


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_nothing_is_asked_of_the_network_even_where_one_is_logged_in(
    tracker: str, tmp_path: Path
) -> None:
    done = report(
        tracker, tmp_path, RUN[:1], variables={"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    )
    assert done.returncode == 0, done.stderr
    assert "looked up" not in done.stderr


def test_wandb_is_told_whether_a_run_failed(tmp_path: Path) -> None:
    for name, error in {"good": "", "bad": "stopped"}.items():
        (tmp_path / name).mkdir()
        report("wandb", tmp_path / name, RUN[:1], error=error)
        codes = [r.exit.exit_code for r in wandb_records(tmp_path / name) if r.HasField("exit")]
        assert codes == [int(bool(error))], name


def test_a_run_has_the_settings_of_its_history_entry_as_its_config(tmp_path: Path) -> None:
    report("trackio", tmp_path, RUN[:1])
    ((name, config),) = configs_in_sqlite(tmp_path).items()
    assert name == TrackedRun.of("a.safetensors", ENTRY, done=0, resume=False, quiet=True).name
    own = {key: value for key, value in config.items() if key[0] != "_"}
    assert own == {"lr": 0.5, "seed": 0, "command": "merge", "data": "ab" * 32}


def test_runs_are_named_after_output_and_settings() -> None:
    def name(output: str, seed: int) -> str:
        entry = {"command": "merge", "settings": {"seed": seed}}
        return TrackedRun.of(output, entry, done=0, resume=False, quiet=True).name

    assert name("x/xs+wl.safetensors", 0).startswith("xs+wl-")
    assert name("a/", 0).startswith("a-")
    assert name("-", 0).startswith("run-")
    assert name("a b.safetensors", 0).startswith("a-b-")
    assert name("a", 0) == name("b/a", 0) != name("a", 1)


@pytest.mark.parametrize(
    ("entry", "point"),
    [
        pytest.param(
            {"step": 0, "weights": {"xs": {"q": 0.5, "v": 1}}},
            Point("event", 0, None, {"weights/xs/q": 0.5, "weights/xs/v": 1.0}),
            id="learned weights",
        ),
        pytest.param(
            {"evaluation": 3, "weights": [0.5, -1.0], "loss": 2.0},
            Point(
                "event",
                3,
                None,
                {"evaluation": 3.0, "weights/0": 0.5, "weights/1": -1.0, "loss": 2.0},
            ),
            id="an evaluation of LoRAHub",
        ),
        pytest.param(
            {"candidate": "0.1", "prune_ratio": 0.1, "steps": 4, "loss": 2.0, "best": True},
            Point("event", 4, "0.1", {"prune_ratio": 0.1, "steps": 4.0, "loss": 2.0, "best": 1.0}),
            id="a trial of a search",
        ),
        pytest.param(
            {"distribution": "importance", "least": float("inf"), "most": None, "modules": 2},
            Point("event", 7, None, {"modules": 2.0}),
            id="texts, and what is no finite number",
        ),
    ],
)
def test_events_are_points_of_their_numbers(entry: dict[str, object], point: Point) -> None:
    assert point_of("event", entry, 7) == point


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_missing_package_is_named_before_the_work(
    tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package = TRACKERS[tracker].package
    with pytest.raises(LorakitError) as raised:
        check_tracker(tracker)
    assert str(raised.value) == (
        f"--track {tracker} needs {package}; run: pip install 'lorakit[track]'"
    )
    check_tracker(None)


def test_event_files_that_cannot_be_written_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))
    run = TrackedRun("a", ENTRY)
    with (
        pytest.raises(LorakitError, match=r"cannot write .*; set \$TENSORBOARD_LOGGING_DIR"),
        TRACKERS["tensorboard"].open(run),
    ):
        pass


class FakeRun:
    """A run of wandb that was resumed, as wandb documents it: one offline cannot be."""

    resumed = True

    def __init__(self, **summary: float) -> None:
        self.summary = summary
        self.logged: list[dict[str, float]] = []
        self.axes: dict[str, str] = {}

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code


def test_a_run_resumed_by_wandb_online_logs_no_step_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, calls = FakeRun(**{"step": 3, "epoch/step": 2}), []

    def init(**settings: object) -> FakeRun:
        calls.append(settings)
        return opened

    fake = types.SimpleNamespace(
        init=init, Settings=dict, errors=types.SimpleNamespace(Error=OSError)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "online")
    with TRACKERS["wandb"].open(TrackedRun("a-1", ENTRY, done=2, resume=True)) as log:
        for fields in RUN[2:]:
            kind: Any = "epoch" if "validation_loss" in fields else "step"
            log(Point(kind, fields["step"], None, {"train_loss": fields["train_loss"]}))
    assert opened.logged == [
        {"step": 4, "train_loss": 0.25},
        {"epoch/step": 4, "epoch/train_loss": 0.75},
    ]
    assert opened.axes == {"train_loss": "step", "epoch/train_loss": "epoch/step"}
    assert (calls[0]["id"], calls[0]["resume"]) == ("a-1", "allow")
    assert opened.exit_code == 0


def test_a_method_without_training_has_nothing_to_track() -> None:
    done = run("merge", "a", "b", "--method", "svd", "--track", "wandb")
    assert done.returncode == 2
    assert "--track does not belong to --method svd" in done.stderr


@pytest.mark.slow
def test_a_real_run_is_tracked_with_its_settings_beside_it(records: Path, tmp_path: Path) -> None:
    command = f"lorakit train-adapter --model tiny --data {records} --epochs 2 --batch-size 1"
    command = (
        f"{command} --log log --track tensorboard -o a.safetensors && "
        f"{command} -o b.safetensors && cmp a.safetensors b.safetensors"
    )
    variables = {n: v for n, v in environment(tmp_path).items() if n.isupper() and "DIR" in n}
    done = shell(command, tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert rounded(held("tensorboard", tmp_path)) == rounded(in_log(tmp_path))
    config = config_in_event_files(tmp_path)
    assert (config["command"], config["batch_size"], config["rank"]) == ("train-adapter", 1, 8)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_terminated_run_goes_on_in_its_tracker(
    tracker: str, records: Path, tmp_path: Path
) -> None:
    options = ["--model", "tiny", "--data", str(records), "--epochs", "8", "--patience", "8"]
    options += ["--batch-size", "1", "--log", "log", "--track", tracker, "-o", "a.safetensors"]
    command = [PROGRAM, "train-adapter", *options, "--resume"]
    first = subprocess.Popen(command, env=environment(tmp_path), cwd=tmp_path)
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and log.read_text("utf-8").count("\n") >= 5, seconds=300)
    first.terminate()
    assert first.wait() == 128 + signal.SIGTERM
    early = held(tracker, tmp_path)
    assert rounded(early) == rounded(in_log(tmp_path))
    done = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert rounded(held(tracker, tmp_path)) == rounded(in_log(tmp_path))
    assert max(held(tracker, tmp_path).values()) == 1 < len(held(tracker, tmp_path)) - len(early)
