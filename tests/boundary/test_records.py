"""The records of find-boundary: which boundary is the best, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.boundary.records import BestCut, read_cut
from lorakit.errors import LorakitError

BEST = {"boundary": 3, "score": 40.5, "metric": "rougeL", "best": True}
OTHER = {"boundary": 2, "score": 41, "best": False}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_the_boundary_is_that_of_the_best_record(tmp_path: Path) -> None:
    base = {"boundary": 0, "score": 99.0, "best": False}
    assert read_cut(write(tmp_path / "b.jsonl", base, OTHER, BEST, OTHER)) == BestCut(3)


def test_layers_that_are_not_the_bottom_ones_are_read(tmp_path: Path) -> None:
    top = {**BEST, "keep": "top", "layers": [3, 4, 5]}
    assert read_cut(write(tmp_path / "b.jsonl", OTHER, top)) == BestCut(3, (3, 4, 5))


def test_a_best_that_scales_layers_names_the_command_that_does(tmp_path: Path) -> None:
    plain = {**OTHER, "factor": 0.25}
    assert read_cut(write(tmp_path / "b.jsonl", plain, {**BEST, "factor": 0.0})) == BestCut(3)
    with pytest.raises(LorakitError, match=r"b.jsonl:1: .*scale-layers --from 3 --factor 0.25"):
        read_cut(write(tmp_path / "b.jsonl", {**BEST, "factor": 0.25}))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], r"b.jsonl: no record is the best; "),
        ([OTHER], r"b.jsonl: no record is the best; "),
        ([BEST, OTHER, BEST], r"b.jsonl:3: a second best, after .*b.jsonl:1; "),
        ([OTHER, {**BEST, "boundary": "3"}], r"b.jsonl:2: 'boundary' is not a natural number; "),
        ([{**BEST, "boundary": True}], r"b.jsonl:1: 'boundary' is not a natural"),
        ([{**BEST, "boundary": -1}], r"b.jsonl:1: 'boundary' is not a natural"),
        ([{**BEST, "boundary": 3.0}], r"b.jsonl:1: 'boundary' is not a natural"),
        ([{**BEST, "score": None}], r"b.jsonl:1: 'score' is not a number; "),
        ([{**BEST, "best": 1}], r"b.jsonl:1: 'best' is not true or false; "),
        ([{**BEST, "layers": 3}], r"b.jsonl:1: 'layers' are not natural numbers; "),
        ([{**BEST, "layers": [0, -1]}], r"b.jsonl:1: 'layers' are not natural numbers; "),
        ([{**BEST, "factor": "0"}], r"b.jsonl:1: 'factor' is not a number from 0 on; "),
        ([{"prompt": "p"}], r"b.jsonl:1: 'boundary' is not"),
        ([[1]], r"b.jsonl:1: not a JSON object"),
    ],
)
def test_other_records_are_refused_by_file_and_line(
    records: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LorakitError, match=message):
        read_cut(write(tmp_path / "b.jsonl", *records))
