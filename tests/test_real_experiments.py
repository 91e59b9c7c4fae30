"""The papers' experiments run from raw data to tables, on tiny with a few records."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TITLES = [
    "scitldr, Table 2",
    "scitldr, pruning",
    "scitldr, Table 4 at a dose of 0.3",
    "scitldr, validation ROUGE-L of XS+WL+TGT by ratio",
    "scitldr, 2 training examples",
    "dialogsum, Table 2",
    "dialogsum, Table 1",
    "dialogsum, Table 6",
    "dialogsum, Table 7: the adapter of scitldr and its boundary",
    "hotpotqa, Table 3",
    "yesno, Table 1 over all seeds",
    "yesno, by boundary",
]
FIGURES = [
    *(f"paper1/scitldr/figure{number}.svg" for number in (4, 5, 6)),
    *("paper2/yesno/tuned.metric.svg", "paper2/dialogsum/tuned.probability.svg"),
]


def run_both(shared: Path, folder: Path) -> str:
    """Run both papers' scripts on every task, as on a GPU, with a command of each at a time."""
    variables = {
        "LORAKIT_ENV": sys.prefix,
        "DATA": str(shared / "data"),
        "JOBS": "1",
        "TARGETS": "scitldr dialogsum",
        "TASKS": "dialogsum yesno scitldr gsm8k hotpotqa",
    }
    done = subprocess.run(
        ["sh", str(ROOT / "examples" / "real" / "gpu.sh"), "--smoke", str(folder)],
        env={**os.environ, **variables},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_experiments_run_from_raw_data_to_tables_and_go_on_where_they_were(
    shared: Path, tmp_path: Path
) -> None:
    printed = run_both(shared, tmp_path)
    lines = printed.splitlines()
    assert [title for title in TITLES if title not in lines] == []
    assert [name for name in FIGURES if not (tmp_path / name).exists()] == []
    adapters = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert run_both(shared, tmp_path) == printed
    assert {path: path.stat().st_mtime_ns for path in adapters} == adapters
