"""What `--track` says of a run: how trackers name it, and the points that log lines become.

This file knows neither trackers nor training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lorakit.runs.resume import run_key

Kind = Literal["step", "epoch", "event"]


@dataclass(frozen=True)
class TrackedRun:
    """A run as its tracker names it.

    `config` is its history entry: command, settings, versions and hashes. `done` are the optimiser
    steps that a run it resumes had taken.
    """

    name: str
    config: Mapping[str, object]
    done: int = 0
    resume: bool = False
    quiet: bool = False

    @classmethod
    def of(
        cls, output: str, entry: Mapping[str, object], *, done: int, resume: bool, quiet: bool
    ) -> TrackedRun:
        """Return a run named after its output and its history entry, as a resumed one is again."""
        stem = re.sub(r"[^\w.+-]+", "-", Path(output).name.removesuffix(".safetensors")).strip("-")
        name = f"{stem or 'run'}-{run_key(entry)[:8]}"
        config = dict(entry)
        settings = config.pop("settings", {})
        config = {**settings, **config} if isinstance(settings, Mapping) else config
        return cls(name, config, done, resume, quiet)


class Point(NamedTuple):
    """The finite numbers of a log line by name, at an optimiser step.

    `candidate` names the run of a search that took the step, None where there is only one.
    """

    kind: Kind
    step: int
    candidate: str | None
    values: dict[str, float]

    @property
    def prefix(self) -> str:
        """What precedes the names of values where one run holds several candidates."""
        epoch = "epoch/" if self.kind == "epoch" else ""
        return epoch if self.candidate is None else f"{self.candidate}/{epoch}"


Log = Callable[[Point], None]


def point_of(kind: Kind, entry: Mapping[str, object], last_step: int) -> Point:
    """Return the point of a log line, at `last_step` where the line has no step of its own.

    An evaluation of LoRAHub's search counts as a step, and a trial of a search over pruning
    settings is at the last of its `steps`. Numbers in lists and objects are named by their path.
    """
    step, candidate = last_step, entry.get("candidate")
    for name in ("step", "evaluation", "steps"):
        value = entry.get(name)
        if isinstance(value, int):
            step = value
            break
    values = dict(_numbers({n: v for n, v in entry.items() if n not in ("step", "candidate")}))
    return Point(kind, step, None if candidate is None else str(candidate), values)


def _numbers(fields: Mapping[str, object], path: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers in fields with their names, truth values as 0 and 1."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}/")
        elif isinstance(value, list | tuple):
            items = {str(place): item for place, item in enumerate(value)}
            yield from _numbers(items, f"{path}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{path}{name}", float(value)
