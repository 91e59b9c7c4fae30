"""The adapter reader under atheris, where that is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.fuzz import headers


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"__metadata__":{"lorakit":"[]"}}'])
def test_the_target_takes_what_is_no_adapter(content: bytes) -> None:
    headers.read(content)


@pytest.mark.slow
def test_bytes_chosen_by_coverage_are_read_or_refused() -> None:
    pytest.importorskip("atheris", reason="needs atheris: pip install atheris")
    command = [sys.executable, "-m", "tests.fuzz.headers", "-runs=100000", "-seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 100000 runs" in done.stderr
