"""Small records for tests that train: lists of words, the first of which are to be repeated."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.reporting import EpochReport, Silent, StepReport

_WORDS = ["red", "blue", "green", "cat", "dog", "sun", "moon", "tree"]


def rows(count: int, seed: int = 0, longest: int = 6) -> list[dict[str, str]]:
    """Return records whose prompts and completions differ in length."""
    draw = random.Random(seed)
    records = []
    for number in range(count):
        words = [draw.choice(_WORDS) for _ in range(draw.randrange(1, longest + 1))]
        said = " ".join(words[: draw.randrange(1, 3)])
        records.append(
            {"id": str(number), "prompt": f"Say {' '.join(words)}:", "completion": f" {said}"}
        )
    return records


def save_rows(path: Path, records: Iterable[Mapping[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    return str(path)


class Recorder(Silent):
    """A reporter that keeps all that is reported to it."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, Any]] = []
        self.epochs: list[Mapping[str, Any]] = []
        self.notes: list[str] = []
        self.events: list[Mapping[str, Any]] = []

    def start(self, steps: int, epochs: int, done: int) -> None:
        self.planned = steps

    def step(self, report: StepReport) -> None:
        self.steps.append(report.log_entry())

    def epoch(self, report: EpochReport) -> None:
        self.epochs.append(report.log_entry())

    def event(self, entry: Mapping[str, Any], text: str) -> None:
        self.events.append(entry)

    def note(self, text: str) -> None:
        self.notes.append(text)
