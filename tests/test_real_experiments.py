"""The papers' experiments run from raw data to tables, on tiny with a few records."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TITLES = {
    "paper1": [
        "scitldr, Table 2",
        "scitldr, pruning",
        "scitldr, Table 4 at a dose of 0.3",
        "scitldr, validation ROUGE-L of XS+WL+TGT by ratio",
        "scitldr, 2 training examples",
        "dialogsum, Table 2",
    ],
    "paper2": [
        "dialogsum, Table 1",
        "dialogsum, Table 6",
        "dialogsum, Table 7: the adapter of scitldr and its boundary",
        "hotpotqa, Table 3",
        "yesno, by boundary",
    ],
}
FIGURES = {
    "paper1": ["scitldr/figure4.svg", "scitldr/figure5.svg", "scitldr/figure6.svg"],
    "paper2": ["yesno/tuned.metric.svg", "dialogsum/tuned.probability.svg"],
}


def run_script(paper: str, shared: Path, folder: Path) -> str:
    done = subprocess.run(
        ["sh", str(ROOT / "examples" / "real" / f"{paper}.sh"), "--smoke", str(folder)],
        env={**os.environ, "LORAKIT_ENV": sys.prefix, "DATA": str(shared / "data")},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("paper", ["paper1", "paper2"])
def test_the_experiments_run_from_raw_data_to_tables_and_go_on_where_they_were(
    paper: str, shared: Path, tmp_path: Path
) -> None:
    printed = run_script(paper, shared, tmp_path / paper)
    lines = printed.splitlines()
    assert [title for title in TITLES[paper] if title not in lines] == []
    assert [name for name in FIGURES[paper] if not (tmp_path / paper / name).exists()] == []
    adapters = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert run_script(paper, shared, tmp_path / paper) == printed
    assert {path: path.stat().st_mtime_ns for path in adapters} == adapters
