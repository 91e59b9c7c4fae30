"""examples/forks.py runs commands when what they read is written."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

FORKS = Path(__file__).parents[1] / "examples" / "forks.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record = '{"id": "a", "prompt": "One and one is", "completion": " two", "prediction": " two"}'
    (tmp_path / "records.jsonl").write_text(record + "\n")
    return tmp_path


def run(folder: Path, commands: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FORKS), *options],
        input="".join(f"{folder} lorakit {command}\n" for command in commands),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_a_command_waits_for_those_that_write_what_it_reads(folder: Path) -> None:
    draws = [f"build-dataset jsonl {a}.jsonl -q -o {b}.jsonl" for a, b in ("bc", "ab")]
    draws.append("build-dataset jsonl records.jsonl -q -o a.jsonl")
    done = run(folder, [*draws, draws[0]], "--jobs", "3", "--verbose")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    order = [line.split()[-1] for line in done.stderr.splitlines() if " s: " in line]
    assert order == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert (folder / "c.jsonl").stat().st_size > 0


def test_what_needs_a_failed_command_is_left_out_and_named(folder: Path) -> None:
    chain = ["missing", "a", "b", "c"]
    lines = [
        f"build-dataset jsonl {source}.jsonl -q -o {target}.jsonl"
        for source, target in itertools.pairwise(chain)
    ]
    lines.append("build-dataset jsonl records.jsonl -q -o other.jsonl")
    done = run(folder, lines, "--jobs", "1", "--keep-going")
    assert done.returncode == 1
    failed = [line.split()[-1] for line in done.stderr.splitlines() if line.startswith("failed:")]
    assert failed == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert (folder / "other.jsonl").exists()


def test_without_keep_going_the_first_failure_ends_it(folder: Path) -> None:
    lines = ["build-dataset jsonl missing.jsonl -q -o a.jsonl"]
    lines.append("build-dataset jsonl records.jsonl -q -o other.jsonl")
    done = run(folder, lines, "--jobs", "1")
    assert done.returncode == 1
    assert "failed: " in done.stderr
    assert not (folder / "other.jsonl").exists()


def test_commands_that_wait_for_one_another_are_named(folder: Path) -> None:
    lines = [f"build-dataset jsonl {a}.jsonl -q -o {b}.jsonl" for a, b in ("xy", "yx")]
    done = run(folder, lines)
    assert done.returncode == 1
    assert "waits for itself" in done.stderr
