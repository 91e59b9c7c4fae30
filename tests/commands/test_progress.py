"""What the commands' reporter writes to stderr and into the log where stderr is no terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorakit.commands._progress import TerminalReporter
from lorakit.errors import LorakitError
from lorakit.reporting import EpochReport, Reporter, StepReport

STEP = StepReport(1, 1, 2.5, 1e-4, math.inf, 100.0)
EPOCH = EpochReport(1, 4, 2.5, 2.25, True, 0.5)


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_a_step_and_an_epoch_are_a_line_of_the_log_each(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with TerminalReporter(quiet=True, log=str(log)) as reporter:
        reporter.start(4, 1, 0)
        reporter.step(STEP)
        reporter.epoch(EPOCH)
    assert lines_of(log) == [
        '{"step": 1, "epoch": 1, "train_loss": 2.5, "lr": 0.0001, "grad_norm": null, '
        '"tokens_per_second": 100.0}',
        '{"epoch": 1, "step": 4, "train_loss": 2.5, "validation_loss": 2.25, "best": true, '
        '"seconds": 0.5}',
    ]


def test_the_candidate_of_a_search_comes_first_and_the_seconds_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    with TerminalReporter(quiet=False, log=str(log)) as reporter:
        reporter.start(4, 3, 0)
        reporter.epoch(
            EpochReport(2, 4, 2.5, 2.25, False, 0.5, validation_score=50.0, candidate="0.1")
        )
    assert list(json.loads(lines_of(log)[0])) == [
        "candidate",
        "epoch",
        "step",
        "train_loss",
        "validation_loss",
        "best",
        "validation_score",
        "seconds",
    ]
    assert capsys.readouterr().err == (
        "0.1: epoch 2/3: train loss 2.5000, validation loss 2.2500, score 50.00\n"
    )


def test_a_resumed_run_appends_to_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for append in (False, True):
        with TerminalReporter(quiet=True, log=str(log), append=append) as reporter:
            reporter.start(4, 1, 0)
            reporter.event({"evaluation": 1}, "evaluation 1")
    assert lines_of(log) == ['{"evaluation": 1}'] * 2


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    reporter = TerminalReporter(quiet=True, log=str(tmp_path / "none" / "log"))
    with pytest.raises(LorakitError, match=r"cannot write .*; choose another --log"):
        reporter.start(4, 1, 0)


@pytest.mark.parametrize("quiet", [False, True])
def test_notes_and_events_are_written_unless_it_is_quiet(
    quiet: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter: Reporter = TerminalReporter(quiet=quiet)
    reporter.note("a")
    reporter.note("Warning: b")
    reporter.event({}, "c")
    assert list(reporter.track("xy", "reading")) == ["x", "y"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("" if quiet else "Note: a\nWarning: b\nc\n")


def test_every_fifth_of_timed_work_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(TerminalReporter(quiet=False).timed(range(7), "reading", 7)) == [*range(7)]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "reading: 2 of 7",
        "reading: 4 of 7",
        "reading: 6 of 7",
        "reading: 7 of 7",
    ]
