"""Trackers: what `--track` feeds with the lines of `--log`, for people who watch many runs.

A tracker is a function here and a line in TRACKERS. It is a context manager that opens a run,
yields a function that logs a point of it, and finishes the run, as failed where an exception
passes. Each imports its own package at use. This file knows no training: points are log lines.

Nothing leaves the machine unless the tracker's own settings say so: trackio writes to its local
store without $TRACKIO_SPACE_ID or $TRACKIO_SERVER_URL, wandb offline without $WANDB_MODE=online.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.commands._tracked import Log, Point, TrackedRun
from lorakit.errors import LorakitError, check_packages
from lorakit.files import explain
from lorakit.hub import hub_out_of_reach

PROJECT = "lorakit"


class Tracker(NamedTuple):
    """The package that a tracker imports, and the function that opens a run of it."""

    package: str
    open: Callable[[TrackedRun], AbstractContextManager[Log]]


def check_tracker(name: str | None) -> None:
    """Raise LorakitError where the package of a tracker is missing; call it before the work."""
    if name is not None:
        check_packages(f"--track {name}", TRACKERS[name].package, extra="track")


@contextlib.contextmanager
def _tensorboard(run: TrackedRun) -> Iterator[Log]:
    """Write event files to $TENSORBOARD_LOGGING_DIR, by default ./runs, a folder for each run.

    The candidates of a search are folders in it, which TensorBoard shows as runs of their own.
    Steps that a resumed run takes again replace those of the earlier one.
    """
    folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or "runs") / run.name
    with contextlib.ExitStack() as stack:
        files: dict[str | None, Callable[[Any], None]] = {}
        files[None] = stack.enter_context(_event_file(folder, run.done + 1 if run.done else 0))
        if not run.done:
            files[None](_config_event(run.config))

        def log(point: Point) -> None:
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.summary import scalar

            if point.candidate is None and point.step < run.done:
                return  # a line that the resumed run repeats
            if point.candidate not in files:
                inner = folder / _file_name(str(point.candidate))
                first = _first_new_step(point) if run.resume else 0
                files[point.candidate] = stack.enter_context(_event_file(inner, first))
            epoch = "epoch/" if point.kind == "epoch" else ""
            for name, value in point.values.items():
                summary = scalar(epoch + name, value)
                files[point.candidate](Event(step=point.step, summary=summary))

        yield log


@contextlib.contextmanager
def _event_file(folder: Path, first_step: int | None) -> Iterator[Callable[[Any], None]]:
    """Yield a function that writes an event to a new event file of a folder.

    What the folder's earlier files hold from `first_step` on counts no longer; None keeps it all.
    Every event is written out at once, by no thread, so that a full disk is an error here.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    with _tensorboard_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")

    def write(event: Any) -> None:
        event.wall_time = time.time()
        with _tensorboard_errors(folder):
            writer.write_event(event)
            writer.flush()

    try:
        if first_step is not None:
            start = SessionLog(status=SessionLog.START)
            write(Event(step=first_step, session_log=start))
        yield write
    finally:
        with contextlib.suppress(OSError):  # a full disk was reported by the write before
            writer.close()


@contextlib.contextmanager
def _tensorboard_errors(folder: Path) -> Iterator[None]:
    """Raise LorakitError for an OSError in the block."""
    try:
        yield
    except OSError as error:
        raise LorakitError(
            f"cannot write {folder}: {explain(error)}; set $TENSORBOARD_LOGGING_DIR to a folder "
            "that can hold event files"
        ) from error


def _config_event(config: Mapping[str, object]) -> Any:
    """Return the event of a text `config`: the run's settings as JSON, for TensorBoard's page."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import text

    lines = json.dumps(config, indent=2, default=str).splitlines()
    return Event(step=0, summary=text("config", "\n".join(f"    {line}" for line in lines)))


def _first_new_step(point: Point) -> int | None:
    """Return the step from which a resumed candidate's points replace earlier ones, or None.

    Its first point is the step it goes on with, or the epoch whose last step was its last.
    """
    return {"step": point.step, "epoch": point.step + 1}.get(point.kind)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name)


@contextlib.contextmanager
def _trackio(run: TrackedRun) -> Iterator[Log]:
    """Log to trackio's project PROJECT, in its local store unless its own settings say otherwise.

    A resumed run goes on with the earlier one, and what that has logged is not logged again. What
    trackio prints goes to stderr: stdout is for data.
    """
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    resume = "allow" if run.resume else "never"
    settings = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
    local = not any(os.environ.get(name) for name in settings)
    # even for its local store trackio would ask the hub for the name of who is logged in
    reach = hub_out_of_reach() if local else contextlib.nullcontext()
    with _on_stderr(quiet=run.quiet), reach:
        try:
            opened = trackio.init(
                PROJECT,
                name=run.name,
                config=dict(run.config),
                resume=resume,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        except (OSError, ValueError) as error:
            raise _cannot_track("trackio", error, "see to $TRACKIO_DIR and its settings") from error
    rows = SQLiteStorage.get_logs(PROJECT, run.name, run_id=opened.id) if run.resume else []
    logged = {(row["step"], name) for row in rows for name in row}

    def log(point: Point) -> None:
        values = {point.prefix + name: value for name, value in point.values.items()}
        new = {name: v for name, v in values.items() if (point.step, name) not in logged}
        if new:
            opened.log(new, step=point.step)

    try:
        yield log
    finally:
        with _on_stderr(quiet=run.quiet):
            trackio.finish()


@contextlib.contextmanager
def _on_stderr(*, quiet: bool) -> Iterator[None]:
    """Send what the block prints to stderr, or nowhere."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(os.devnull, "w")) if quiet else sys.stderr
        stack.enter_context(contextlib.redirect_stdout(stream))
        yield


@contextlib.contextmanager
def _wandb(run: TrackedRun) -> Iterator[Log]:
    """Log to wandb's project $WANDB_PROJECT, by default PROJECT, offline without $WANDB_MODE.

    A resumed run goes on with the earlier one where wandb can, online: values are plotted over a
    step of their own, and those up to the last one that wandb has are not logged again. Dots in
    names become underscores, since wandb takes them for paths.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    online = os.environ.get("WANDB_MODE") == "online"
    try:
        opened = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=run.name.replace("+", "-"),
            name=run.name,
            config=dict(run.config),
            mode=None if os.environ.get("WANDB_MODE") else "offline",
            resume="allow" if run.resume and online else None,
            settings=wandb.Settings(silent=run.quiet, console="off"),
        )
    except (OSError, wandb.errors.Error) as error:
        raise _cannot_track("wandb", error, "set $WANDB_MODE to offline, or log in") from error
    logged: dict[str, int] = {}  # the last steps that wandb has, by their names there

    def log(point: Point) -> None:
        prefix = point.prefix.replace(".", "_")
        counter = prefix + ("event_step" if point.kind == "event" else "step")
        if counter not in logged:
            last = opened.summary.get(counter) if opened.resumed else None
            logged[counter] = int(last) if isinstance(last, int | float) else -1
        if point.step <= logged[counter]:
            return
        values = {prefix + n.replace(".", "_"): value for n, value in point.values.items()}
        for name in values:
            opened.define_metric(name, step_metric=counter)
        opened.log({counter: point.step, **values})

    try:
        yield log
    except BaseException:
        opened.finish(exit_code=1)
        raise
    opened.finish()


def _cannot_track(name: str, error: Exception, remedy: str) -> LorakitError:
    return LorakitError(f"--track {name}: {error}; {remedy}")


TRACKERS: Mapping[str, Tracker] = {
    "trackio": Tracker("trackio", _trackio),
    "tensorboard": Tracker("tensorboardX", _tensorboard),
    "wandb": Tracker("wandb", _wandb),
}
