"""One writer for each output: locks, the processes of a launcher, and what killed writers leave."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from lorakit.files import atomic_path, hidden_path_beside
from lorakit.runs import sole_writer as module
from lorakit.runs.signals import Terminated, deferred, terminating
from lorakit.runs.sole_writer import Holder, refuse_second_writer, sole_writer
from tests.support.program import ENVIRONMENT, PROGRAM, run, wait_for

TEMPLATES = ["--template", "{{text}} =", "--completion", " {{text}}"]
BUILD = ["build-dataset", "jsonl", *TEMPLATES, "-o"]
HELD = r"out is being written by process \d+ on .+; wait for it, or choose another -o"


def start_building(output: Path) -> subprocess.Popen[str]:
    """Start a command that has written a record to its side file and waits for more of stdin."""
    process = subprocess.Popen(
        [PROGRAM, *BUILD, str(output)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=ENVIRONMENT,
    )
    assert process.stdin is not None
    process.stdin.write('{"text": "one"}\n' * 4000)
    process.stdin.flush()
    wait_for(lambda: any(path.stat().st_size for path in output.parent.glob(".out.*.part")))
    return process


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# — the lock —


def test_a_second_writer_ends_at_once_and_says_who_holds_the_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = start_building(output)
    try:
        second = run(*BUILD, str(output), stdin='{"text": "two"}\n')
        assert second.returncode == 1
        assert second.stderr == (
            f"Error: {output} is being written by process {first.pid} on {platform.node()} "
            "(lorakit build-dataset); wait for it, or choose another -o\n"
        )
    finally:
        first.kill()
        first.communicate()
    assert run(*BUILD, str(output), stdin='{"text": "two"}\n').returncode == 0
    assert names_in(tmp_path) == ["out"]
    assert json.loads(output.read_text())["completion"] == " two"


COMMANDS = {
    "build-dataset": BUILD[:-1],
    "train-adapter": ["train-adapter", "--data", "records.jsonl"],
    "merge": ["merge", "a.safetensors", "--data", "records.jsonl"],
    "lorahub": ["merge", "a.safetensors", "--data", "records.jsonl", "--method", "lorahub"],
    "generate": ["generate", "--data", "records.jsonl"],
    "find-boundary": ["find-boundary", "a.safetensors", "--data", "records.jsonl"],
    "score": ["score", "records.jsonl"],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_command_that_resumes_refuses_an_output_that_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with sole_writer("out"), pytest.raises(LorakitError, match=HELD):
        lorakit.main([*arguments, "-o", "out"], standalone_mode=False)


def test_a_lock_goes_with_its_block_and_streams_have_none(tmp_path: Path) -> None:
    for _ in range(2):
        with sole_writer(str(tmp_path / "out")):
            assert names_in(tmp_path) == [".out.lock"]
    with sole_writer("-"), sole_writer("-"), sole_writer("/dev/null"):
        assert names_in(tmp_path) == []


def test_a_link_and_what_it_points_to_are_one_output(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with (
        sole_writer(str(tmp_path / "out")),
        pytest.raises(LorakitError, match="is being written"),
        sole_writer(str(tmp_path / "link")),
    ):
        pass


def test_processes_that_do_not_write_hold_nothing(tmp_path: Path) -> None:
    with sole_writer(str(tmp_path / "out")), sole_writer(str(tmp_path / "out"), writes=False):
        pass


def test_a_new_folder_is_made_for_the_lock_and_goes_with_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with sole_writer(f"{tmp_path}/new/deep/out/", adapter=True):
            assert names_in(tmp_path / "new" / "deep") == [".out.lock"]
            raise LorakitError("no; try")

    with pytest.raises(LorakitError, match="no; try"):
        fail()
    assert names_in(tmp_path) == []
    refuse_second_writer(f"{tmp_path}/new/deep/out/")
    assert names_in(tmp_path) == []
    with (
        pytest.raises(LorakitError, match=r"cannot write .+: no such file or directory"),
        sole_writer(f"{tmp_path}/new/out"),
    ):
        pass


HOLDERS = {
    "a dead process": (Holder(2**22 + 1, platform.node(), "lorakit merge"), False),
    "a live one": (Holder(os.getppid(), platform.node(), "lorakit merge"), True),
    "one on another host": (Holder(1, "elsewhere", "lorakit merge"), True),
    "no record": (None, False),
}


@pytest.mark.parametrize(("holder", "held"), HOLDERS.values(), ids=HOLDERS.keys())
def test_without_locks_the_record_of_the_holder_has_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Holder | None, held: bool
) -> None:
    monkeypatch.setattr(module, "try_lock", lambda descriptor: None)
    output = str(tmp_path / "out")
    hidden_path_beside(output, "lock").write_text("?" if holder is None else json.dumps(holder))
    if not held:
        with sole_writer(output):
            pass
        assert names_in(tmp_path) == []
        return
    with pytest.raises(LorakitError, match=r"delete .+lock if that process is gone"):
        refuse_second_writer(output)


# — several processes —


def test_what_is_not_shared_out_runs_in_the_first_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows").write_text('{"text": "one"}\n')
    output = tmp_path / "out"
    arguments = ["build-dataset", "jsonl", str(tmp_path / "rows"), *TEMPLATES, "-o", str(output)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    lorakit.main(arguments, standalone_mode=False)
    assert not output.exists()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    lorakit.main(arguments, standalone_mode=False)
    assert "build-dataset runs in one process; the others have ended" in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == 1
    assert "WORLD_SIZE" not in os.environ


# — signals and what they leave —

SIGNALS = {"SIGTERM": (signal.SIGTERM, 143), "SIGHUP": (signal.SIGHUP, 129)}


@pytest.mark.parametrize(("number", "code"), SIGNALS.values(), ids=SIGNALS.keys())
def test_a_terminated_command_leaves_what_resume_needs_and_nothing_else(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start_building(tmp_path / "out")
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert stderr == "Terminated!\n"
    (side,) = names_in(tmp_path)
    assert side.startswith(".out.")
    assert side.endswith(".part")
    rows = '{"text": "one"}\n' * 5000
    assert run(*BUILD, str(tmp_path / "out"), "--resume", "-q", stdin=rows).returncode == 0
    assert names_in(tmp_path) == ["out"]
    assert run(*BUILD, str(tmp_path / "whole"), stdin=rows).returncode == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_resumed_data_set_refuses_another_source(tmp_path: Path) -> None:
    process = start_building(tmp_path / "out")
    process.kill()
    process.communicate()
    done = run(*BUILD, str(tmp_path / "out"), "--resume", stdin='{"text": "two"}\n')
    assert done.returncode == 1
    assert "record 1 is not the one that the killed run wrote" in done.stderr


def test_a_signal_within_a_write_deletes_the_side_file(tmp_path: Path) -> None:
    def write() -> None:
        with terminating(), atomic_path(tmp_path / "out") as side:
            side.write_text("half")
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated):
        write()
    assert names_in(tmp_path) == []


WRITER = """
import sys, time
from lorakit.files import atomic_path
with atomic_path(sys.argv[1]):
    print("open", flush=True)
    time.sleep(600)
"""


def test_side_files_of_dead_writers_are_deleted_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(output)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    (side,) = names_in(tmp_path)
    other = tmp_path / ".out.other.abcdefgh.part"  # of a file named out.other
    other.touch()
    with atomic_path(output):
        pass
    assert side in names_in(tmp_path)
    process.kill()
    process.communicate()
    assert side in names_in(tmp_path)
    with atomic_path(output):
        pass
    assert names_in(tmp_path) == sorted(["out", other.name])


def raise_within(steps: list[int], *numbers: signal.Signals) -> None:
    """Raise signals within a block that defers them, and count those that it outlasts."""
    with terminating(), deferred():
        for number in numbers:
            signal.raise_signal(number)
            steps.append(number)


def test_a_deferred_signal_comes_at_the_end_of_the_block() -> None:
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        raise_within(steps, signal.SIGINT)
    with pytest.raises(Terminated) as error:
        raise_within(steps, signal.SIGTERM, signal.SIGTERM)
    assert error.value.number == signal.SIGTERM
    assert steps == [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]


def test_a_second_interrupt_does_not_wait() -> None:
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        raise_within(steps, signal.SIGINT, signal.SIGINT)
    assert steps == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminating(), deferred():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


# — empty sources —


def test_a_source_without_records_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    done = run(*BUILD, str(tmp_path / "out"), stdin="")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "Error: stdin gave no records; check the recipe, --split and the filters\n"
    )
    assert (tmp_path / "out").read_text() == "old"
    assert names_in(tmp_path) == ["out"]
