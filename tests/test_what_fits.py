"""The table of what fits on which card is what `--dry-run` says of bases without weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "examples" / "README.md"


def printed(*models: str) -> list[str]:
    """Return the lines that the script prints."""
    script = str(ROOT / "examples" / "what_fits.py")
    done = subprocess.run(
        [sys.executable, script, *models], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_page_shows_what_the_script_prints_of_the_smallest_base() -> None:
    lines = printed("SmolLM2-135M")
    assert len(lines) == 4
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line not in page] == []


@pytest.mark.slow
def test_the_page_shows_the_whole_table() -> None:
    assert "\n".join(printed()) in PAGE.read_text(encoding="utf-8")
