"""Of several processes the first alone speaks; accelerate's on a CPU are really several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.errors import LorakitError
from lorakit.runs import processes
from lorakit.runs.processes import LostProcessError, asked_processes, start_all_of_accelerate
from lorakit.runs.signals import Terminated, deferred, terminating

_ASKED = {
    "two words": (["accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "lorakit"], 2),
    "one word": (["launch", "--num_processes=3", "-m", "lorakit"], 3),
    "with hyphens": (["launch", "--num-processes", "4", "-m", "lorakit"], 4),
    "not there": (["launch", "--cpu", "-m", "lorakit", "--seed", "2"], None),
    "no number": (["launch", "--num_processes", "many"], None),
    "the last word": (["launch", "--num_processes"], None),
}


@pytest.mark.parametrize(("line", "count"), _ASKED.values(), ids=_ASKED.keys())
def test_the_number_of_processes_is_read_from_accelerates_line(
    line: list[str], count: int | None
) -> None:
    assert asked_processes(line) == count


class ExecutedError(Exception):
    pass


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `accelerate launch --cpu` leaves in the environment; the lines that were executed."""
    executed: list[list[str]] = []

    def execute(program: str, line: list[str]) -> None:
        executed.append([program, *line[1:]])
        raise ExecutedError

    for name in processes._RANKED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(sys, "argv", ["lorakit", "show", "data.jsonl"])
    return executed


def test_the_one_process_of_accelerate_becomes_torchrun(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_command_line_of", lambda _: ["--num_processes", "2"])
    with pytest.raises(ExecutedError):
        start_all_of_accelerate()
    (line,) = launched
    assert line[:2] == [sys.executable, "-m"]
    assert line[line.index("--nproc-per-node") + 1] == "2"
    assert line[-4:] == ["--", "lorakit", "show", "data.jsonl"]


def test_a_number_that_is_not_to_be_seen_is_an_error(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_command_line_of", lambda _: [])
    with pytest.raises(LorakitError, match="give it --num_processes N, or run: torchrun"):
        start_all_of_accelerate()


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "0"), ("WORLD_SIZE", "2"), ("ACCELERATE_USE_CPU", "false"), ("MASTER_PORT", None)],
)
def test_a_process_that_has_its_place_stays_what_it_is(
    launched: list[list[str]], monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    start_all_of_accelerate()
    assert launched == []


# — who speaks —

SECOND = {"RANK": "1", "WORLD_SIZE": "2"}
FAILING = """
from lorakit.runs import processes
processes._PATIENCE = {}
from lorakit import cli
cli.main()
"""


def second(patience: float, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the second of two processes, that waits so many seconds for the first."""
    return subprocess.Popen(
        [sys.executable, "-c", FAILING.format(patience), *arguments],
        env={**os.environ, **SECOND},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["generate", "--no-such-option"], 2, "Error: No such option"),
        (["inspect", "none.safetensors"], 0, ""),  # the first one's alone
        (["score", "none.jsonl"], 0, ""),
        (["generate", "--help"], 0, ""),
        (["generate", "none.safetensors", "--data", "d", "--model", "tiny"], 1, "Error: "),
    ],
    ids=["bad usage", "inspect", "score", "help", "a missing file"],
)
def test_another_process_speaks_only_of_what_is_its_own(
    arguments: list[str], code: int, line: str, tmp_path: Path
) -> None:
    process = second(0, *arguments, cwd=tmp_path)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (code, "")
    assert stderr.startswith(line)
    assert stderr == "" if code == 0 else stderr.endswith("(process 1 of 2)\n")
    assert len(stderr.splitlines()) == (code > 0)


def test_a_process_that_the_launcher_ends_meanwhile_says_nothing(tmp_path: Path) -> None:
    process = second(60, "generate", "--no-such-option", cwd=tmp_path)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("signalled", [True, False])
def test_a_signal_to_all_processes_explains_the_end_of_another(signalled: bool) -> None:
    def lose(signalled: bool) -> None:
        with terminating(), deferred():
            if signalled:
                signal.raise_signal(signal.SIGTERM)
            raise LostProcessError("another process has ended")

    with pytest.raises(Terminated if signalled else LostProcessError):
        lose(signalled)
