"""The Reporter of the commands: lines and bars on stderr, and the log that `--log` asks for.

Bars are drawn by rich where stderr is a terminal; elsewhere a run writes one plain line an epoch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING, TypeVar

import click

from lorakit.commands._tracked import Kind, Log, TrackedRun, point_of
from lorakit.commands._trackers import TRACKERS
from lorakit.errors import LorakitError
from lorakit.files import explain
from lorakit.foreign_text import printable
from lorakit.reporting import EpochReport, StepReport
from lorakit.runs.processes import is_first_process

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


class TerminalReporter:
    """Reports on stderr, unless it is quiet, and in a log and to a tracker, if there is one.

    Of several processes only the first reports. As a context manager it ends the bar, closes the
    log and finishes the tracker's run, which is named after `output`, of a training run.
    """

    def __init__(
        self,
        *,
        quiet: bool,
        log: str | None = None,
        append: bool = False,
        track: str | None = None,
        output: str = "",
    ) -> None:
        is_first = is_first_process()
        self._quiet = quiet or not is_first
        self._log_path, self._append = log if is_first else None, append
        track = track if is_first else None
        self._log: IO[str] | None = None
        self._tracker, self._output = track, output
        self._entry: Mapping[str, object] = {}
        self._log_point: Log | None = None
        self._epochs = self._last_step = 0
        self._advance_bar: Callable[[str], None] | None = None
        self._exit_stack = contextlib.ExitStack()

    def __enter__(self) -> TerminalReporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit_stack.__exit__(kind, error, trace)

    @property
    def _draws(self) -> bool:
        """Whether bars and curves can be seen."""
        return not self._quiet and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """Write `Note: …`, or a warning as it is."""
        self._say(text if text.startswith("Warning:") else f"Note: {text}")

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items under a bar, where stderr is a terminal."""
        if not self._draws:
            yield from items
            return
        from rich.progress import track

        yield from track(items, what, total=total, console=_console(), transient=True)

    def timed(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """Yield the items and show the time left: under a bar, or in a line for each fifth."""
        if self._quiet or self._draws:
            yield from self.track(items, what, total)
            return
        started, fifth = time.monotonic(), max(1, -(-total // 5))
        for count, item in enumerate(items, 1):
            yield item
            if count % fifth == 0 or count == total:
                left = (time.monotonic() - started) / count * (total - count)
                self._say(f"{what}: {count} of {total}, {left:.0f} s left")

    def sketch(self, lines: Sequence[str]) -> None:
        """Show a curve drawn in text, where stderr is a terminal."""
        if self._draws:
            for line in lines:
                self._say(line)

    @contextlib.contextmanager
    def bytes_read(self, paths: Sequence[str]) -> Iterator[Callable[[int], object]]:
        """Yield a function that moves a bar over the files by a number of bytes read.

        The bar is drawn only where stderr is a terminal.
        """
        if not self._draws:
            yield int  # takes a count and does nothing with it
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        sizes = [os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths]
        total = sum(sizes) if sizes and all(sizes) else None
        columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=_console(), transient=True) as bar:
            task = bar.add_task("reading", total=total)
            yield lambda count: bar.advance(task, count)

    def describe(self, entry: Mapping[str, object]) -> None:
        """Take note of the run's history entry, for the tracker."""
        self._entry = entry

    def start(self, steps: int, epochs: int, done: int) -> None:
        """Open the log, the tracker's run and, on a terminal, a bar over the optimiser steps."""
        self._epochs = epochs
        if self._log_path:
            self._log = _open_log(self._log_path, self._append)
            self._exit_stack.callback(_close_log, self._log)
        if self._tracker is not None:
            run = TrackedRun.of(
                self._output, self._entry, done=done, resume=self._append, quiet=self._quiet
            )
            self._log_point = self._exit_stack.enter_context(TRACKERS[self._tracker].open(run))
            self._last_step = done
        if self._draws:
            self._advance_bar = self._exit_stack.enter_context(_training_bar(steps, done))

    def step(self, report: StepReport) -> None:
        """Log an optimiser step and move the bar."""
        self._write("step", report.log_entry())
        if self._advance_bar is not None:
            self._advance_bar(f"epoch {report.epoch}, loss {report.train_loss:.3f}")

    def epoch(self, report: EpochReport) -> None:
        """Log an epoch and write a line about it."""
        self._write("epoch", report.log_entry())
        self._say(_epoch_line(report, self._epochs))

    def event(self, entry: Mapping[str, object], text: str) -> None:
        """Log an entry and write a line about it."""
        self._write("event", entry)
        self._say(text)

    def _say(self, line: str) -> None:
        """Write a line to stderr, safe to print, unless it is quiet."""
        if not self._quiet:
            click.echo(printable(line), err=True)

    def _write(self, kind: Kind, entry: Mapping[str, object]) -> None:
        """Write an entry to the log and to the tracker, if there is one."""
        if self._log is not None:
            values = {name: _json_value(value) for name, value in entry.items()}
            try:
                self._log.write(json.dumps(values) + "\n")
                self._log.flush()
            except OSError as error:
                raise _cannot_log(self._log.name, error) from error
        if self._log_point is not None:
            point = point_of(kind, entry, self._last_step)
            self._last_step = point.step
            self._log_point(point)


def _epoch_line(report: EpochReport, epochs: int) -> str:
    """Return what stderr says about an epoch."""
    name = "" if report.candidate is None else f"{report.candidate}: "
    score = report.validation_score
    return (
        f"{name}epoch {report.epoch}/{epochs}: train loss {report.train_loss:.4f}, "
        f"validation loss {report.validation_loss:.4f}"
        f"{'' if score is None else f', score {score:.2f}'}{', best' if report.best else ''}"
    )


@contextlib.contextmanager
def _training_bar(steps: int, done: int) -> Iterator[Callable[[str], None]]:
    """Show a bar and yield a function that moves it by a step and sets its text."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=_console(), transient=True) as bar:
        task = bar.add_task("training", total=steps, completed=done)
        yield lambda text: bar.update(task, advance=1, description=text)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _json_value(value: object) -> object:
    """Return the value, or None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_log(path: str, append: bool) -> IO[str]:
    """Open the file of --log; LorakitError where it cannot be written."""
    try:
        return open(path, "a" if append else "w", encoding="utf-8")
    except OSError as error:
        raise _cannot_log(path, error) from error


def _cannot_log(path: str, error: OSError) -> LorakitError:
    return LorakitError(f"cannot write {path}: {explain(error)}; choose another --log")


def _close_log(log: IO[str]) -> None:
    with contextlib.suppress(OSError):  # a full disk was reported by the write before
        log.close()
