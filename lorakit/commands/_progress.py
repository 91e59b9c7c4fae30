"""What a person sees of a long run, on stderr, and what `--log` keeps of it.

Bars by rich where stderr is a terminal, else one plain line an epoch. Only commands use this; the
library tells a Watcher what happens and prints nothing.
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
from typing import IO, Any, TypeVar

import click

from lorakit.errors import LorakitError
from lorakit.files import explain
from lorakit.reporting import EpochReport, StepReport

T = TypeVar("T")


class Notes:
    """Says single lines on stderr, unless told to be quiet, and shows bars on a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet

    def note(self, text: str) -> None:
        """Say one line: `Note: …`, or a warning as it is."""
        if not self.quiet:
            prefix = "" if text.startswith("Warning:") else "Note: "
            click.echo(f"{prefix}{text}", err=True)

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield items, `total` where that is known, under a bar, where stderr is a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield from items
            return
        from rich.progress import track

        yield from track(items, what, total=total, console=_console(), transient=True)

    tracked = track

    def timed(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """Yield `total` items under a bar, or with a line for each fifth, and the time left."""
        if self.quiet or sys.stderr.isatty():
            yield from self.track(items, what, total)
            return
        started, fifth = time.monotonic(), max(1, -(-total // 5))
        for count, item in enumerate(items, 1):
            yield item
            if count % fifth == 0 or count == total:
                left = (time.monotonic() - started) / count * (total - count)
                click.echo(f"{what}: {count} of {total}, {left:.0f} s left", err=True)

    def sketch(self, lines: Sequence[str]) -> None:
        """Show a curve drawn in text, where stderr is a terminal."""
        if not self.quiet and sys.stderr.isatty():
            for line in lines:
                click.echo(line, err=True)

    @contextlib.contextmanager
    def bytes_read(self, paths: Sequence[str]) -> Iterator[Callable[[int], object]]:
        """Yield what to tell the number of bytes read: a bar over the files, on a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield int
            return
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        sizes = [os.path.getsize(path) if os.path.isfile(path) else 0 for path in paths]
        total = sum(sizes) if sizes and all(sizes) else None
        columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=_console(), transient=True) as bar:
            task = bar.add_task("reading", total=total)
            yield lambda count: bar.advance(task, count)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


class TrainingProgress(Notes):
    """Watches a training run: a bar, or a line an epoch, and the log file."""

    def __init__(self, *, log: str | None, append: bool, quiet: bool) -> None:
        super().__init__(quiet=quiet or not _is_main_process())
        self._log_path = log if _is_main_process() else None
        self._append = append
        self._log: IO[str] | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._log is not None:
            self._log.close()

    def start(self, steps: int, epochs: int, done: int) -> None:
        self._epochs = epochs
        if self._log_path:
            self._log = _open_log(self._log_path, self._append)
        if self.quiet or not sys.stderr.isatty():
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=_console(), transient=True)
        self._task = self._bar.add_task("training", total=steps, completed=done)
        self._bar.start()

    def step(self, report: StepReport) -> None:
        self._write(report.log_entry())
        if self._bar is not None:
            text = f"epoch {report.epoch}, loss {report.train_loss:.3f}"
            self._bar.update(self._task, advance=1, description=text)

    def epoch(self, report: EpochReport) -> None:
        self._write(report.log_entry())
        name = "" if report.candidate is None else f"{report.candidate}: "
        score = report.validation_score
        text = (
            f"{name}epoch {report.epoch}/{self._epochs}: train loss {report.train_loss:.4f}, "
            f"validation loss {report.validation_loss:.4f}"
            f"{'' if score is None else f', score {score:.2f}'}{', best' if report.best else ''}"
        )
        if not self.quiet:
            click.echo(text, err=True)

    def event(self, entry: Mapping[str, Any], text: str) -> None:
        """Keep an entry and say it in a line."""
        self._write(entry)
        if not self.quiet:
            click.echo(text, err=True)

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._log is not None:
            told = {name: _plain(value) for name, value in entry.items()}
            self._log.write(json.dumps(told) + "\n")
            self._log.flush()


def _plain(value: Any) -> Any:
    """Return the value, or null for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_main_process() -> bool:
    """Whether this is the first of the processes that torchrun or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _open_log(path: str, append: bool) -> IO[str]:
    try:
        return open(path, "a" if append else "w", encoding="utf-8")
    except OSError as error:
        raise LorakitError(
            f"cannot write {path}: {explain(error)}; choose another --log"
        ) from error
