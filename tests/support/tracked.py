"""A run's reports to a tracker, made in a process of their own, and what the tracker then holds.

Trackers read where they write from the environment as they are imported, hence the processes.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.reporting import EpochReport, StepReport

# A value of a tracker: its name, with the candidate before it, its step, and the number.
Held = Counter[tuple[str, int, float]]
ENTRY = {"command": "merge", "settings": {"lr": 0.5, "seed": 0}, "data": "ab" * 32}


def step(number: int, candidate: str | None = None, **measurements: float) -> dict[str, Any]:
    """Return the fields of the report of a step, two of which are an epoch."""
    return {
        "step": number,
        "epoch": (number + 1) // 2,
        "train_loss": 1 / number,
        "lr": 0.5,
        "grad_norm": 2.0,
        "tokens_per_second": 10.0,
        "measurements": measurements,
        "candidate": candidate,
    }


def epoch(number: int, candidate: str | None = None) -> dict[str, Any]:
    """Return the fields of the report of an epoch."""
    return {
        "epoch": number,
        "step": 2 * number,
        "train_loss": 0.75,
        "validation_loss": 0.25,
        "best": True,
        "seconds": 0.5,
        "candidate": candidate,
    }


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which every tracker writes below a folder."""
    own = {name: value for name, value in os.environ.items() if "WANDB" not in name}
    return {
        **own,
        "TENSORBOARD_LOGGING_DIR": str(folder / "runs"),
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_DIR": str(folder),
    }


def report(
    tracker: str,
    folder: Path,
    reports: Sequence[Mapping[str, Any]],
    *,
    entry: Mapping[str, Any] = ENTRY,
    done: int = 0,
    resume: bool = False,
    error: str = "",
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Report a run to a tracker and to the log `log`; `error` is raised at its end.

    Every host that is looked up is named on stderr.
    """
    call = [tracker, list(reports), dict(entry), done, resume, error]
    return subprocess.run(
        [sys.executable, "-m", "tests.support.tracked", json.dumps(call)],
        cwd=folder,
        env={**environment(folder), "PYTHONPATH": os.pathsep.join(sys.path), **(variables or {})},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def held(tracker: str, folder: Path) -> Held:
    """Return what a tracker holds, each value as often as it holds it."""
    return {"tensorboard": in_event_files, "trackio": in_sqlite, "wandb": in_wandb_files}[tracker](
        folder
    )


def in_event_files(folder: Path) -> Held:
    """Read TensorBoard's event files by TensorBoard's own accumulator; folders are candidates."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: Held = Counter()
    (run,) = (folder / "runs").iterdir()
    for place in [run, *(path for path in run.iterdir() if path.is_dir())]:
        accumulator = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
        prefix = "" if place == run else f"{place.name}/"
        for tag in accumulator.Tags()["scalars"]:
            values.update((prefix + tag, e.step, e.value) for e in accumulator.Scalars(tag))
    return values


def config_in_event_files(folder: Path) -> dict[str, Any]:
    """Return the config that the event files of the one run in a folder hold as a text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (folder / "runs").iterdir()
    (text,) = EventAccumulator(str(run)).Reload().Tensors("config/text_summary")
    config: dict[str, Any] = json.loads(text.tensor_proto.string_val[0])
    return config


def in_sqlite(folder: Path) -> Held:
    """Read trackio's local store."""
    values: Held = Counter()
    for at, text in _rows(folder, "SELECT step, metrics FROM metrics"):
        values.update((name, at, value) for name, value in json.loads(text).items())
    return values


def configs_in_sqlite(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the configs of the runs in trackio's local store by the runs' names."""
    rows = _rows(folder, "SELECT run_name, config FROM configs")
    return {name: json.loads(text) for name, text in rows}


def _rows(folder: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(folder / "trackio" / "lorakit.db")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def in_wandb_files(folder: Path) -> Held:
    """Read the histories of wandb's offline runs; the steps are those of lorakit, not wandb's."""
    values: Held = Counter()
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") != "history":
            continue
        items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
        row = {name: json.loads(text) for name, text in items.items() if name[0] != "_"}
        (counter,) = (name for name in row if name.endswith("step"))
        at = row.pop(counter)
        values.update((name, at, value) for name, value in row.items())
    return values


def wandb_records(folder: Path) -> list[Any]:
    """Return the records in the files of wandb's offline runs."""
    from wandb.proto.wandb_internal_pb2 import Record

    return [
        Record.FromString(data)
        for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        for data in _framed(path.read_bytes())
    ]


def _framed(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, as wandb writes it.

    After a header of 7 bytes come blocks of 32 KiB, the first with the header in it; a record is
    in pieces, each with a checksum (4 bytes), its length (2) and whether more pieces follow (1).
    """
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def _name_lookup(event: str, details: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo":
        print(f"looked up {details[0]}", file=sys.stderr)


def main() -> None:
    sys.addaudithook(_name_lookup)
    from lorakit.commands._progress import TerminalReporter

    tracker, reports, entry, done, resume, error = json.loads(sys.argv[1])
    with TerminalReporter(
        quiet=False, log="log", append=resume, track=tracker, output="a.safetensors"
    ) as reporter:
        reporter.describe(entry)
        reporter.start(8, 4, done)
        for fields in reports:
            if "validation_loss" in fields:
                reporter.epoch(EpochReport(**fields))
            elif "train_loss" in fields:
                reporter.step(StepReport(**fields))
            else:
                reporter.event(fields, "an event")
        if error:
            raise KeyboardInterrupt(error)


if __name__ == "__main__":
    main()
