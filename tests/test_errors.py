"""A missing optional package is told before the work, and before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.program import ENVIRONMENT

HEAVY = ("torch", "transformers", "peft", "matplotlib", "huggingface_hub", "lxml", "trafilatura")

# Runs the program as if a package were not installed; ends with the heavy modules it imported.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
missing = sys.argv.pop(1)
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: (
    None if name.split(".")[0] == missing else find(name, *rest)
)
from lorakit.cli import main
try:
    main()
finally:
    print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""

BASE = ("--data", "r.jsonl")
RUNS = {
    "plot of merge": (
        "matplotlib",
        ("merge", "a.safetensors", *BASE, "--prune-ratio", "auto", "--plot", "a.png"),
        "plot",
    ),
    "plot of find-boundary": (
        "matplotlib",
        ("find-boundary", "a.safetensors", *BASE, "--plot", "a.png"),
        "plot",
    ),
    "plot of inspect": (
        "matplotlib",
        ("inspect", "a.safetensors", "--importance", *BASE, "--plot", "a.png"),
        "plot",
    ),
    "judge": (
        "openai",
        ("judge", "r.jsonl", "--endpoint", "http://127.0.0.1:1/v1", "--judge-model", "x"),
        "endpoint",
    ),
    "html": ("trafilatura", ("build-dataset", "news-html", "p.html"), "html"),
    "html without lxml": ("lxml", ("build-dataset", "news-html", "p.html"), "html"),
    "highlights": (
        "cssselect",
        ("build-dataset", "news-html", "p.html", "--highlights", "li"),
        "html",
    ),
    "latex": ("pylatexenc", ("build-dataset", "latex", "p.tex"), "latex"),
    "parquet": ("pyarrow", ("build-dataset", "parquet", "p.parquet"), "parquet"),
    "hub": ("pyarrow", ("build-dataset", "hf://owner/name"), "hub"),
    "hub without a reader of cards": ("yaml", ("build-dataset", "hf://owner/name"), "hub"),
    "zst": ("zstandard", ("build-dataset", "jsonl", "p.jsonl.zst"), "zst"),
}


@pytest.mark.parametrize(("package", "arguments", "extra"), RUNS.values(), ids=RUNS.keys())
def test_a_missing_package_is_told_before_anything_heavy_is_imported(
    package: str, arguments: tuple[str, ...], extra: str, tmp_path: Path
) -> None:
    for name in ("p.html", "p.tex", "p.parquet"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "p.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "r.jsonl").write_text('{"prompt": "p", "completion": "c", "prediction": "c"}\n')
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(heavy=HEAVY), package, *arguments],
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        cwd=tmp_path,
        check=False,
    )
    line, imported = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("Error: ")
    assert f" needs {package}; run: pip install 'lorakit[{extra}]'" in line
    assert imported == "[]"
