"""The documented row of each recipe, as the file it would stand in.

A recipe's function shows a real-shaped row, indented, at the end of its docstring; `⇥` is a tab.
`build-dataset RECIPE --show` reads it from there, so what the documentation shows is what works.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.recipes.request import Rows


def sample_text(rows: Rows, name: str) -> str:
    """Return the indented text at the end of a recipe's docstring; JSON lines in one line each."""
    lines = (inspect.getdoc(rows) or "").splitlines()
    start = len(lines)
    while start and (not lines[start - 1].strip() or lines[start - 1].startswith("    ")):
        start -= 1
    block = "\n".join(line[4:].replace("⇥", "\t") for line in lines[start:]).strip("\n")
    if not block:
        raise LorakitError("no sample row here; run Python without -OO, or name a SOURCE")
    if name.endswith(".jsonl"):
        return json.dumps(json.loads(block), ensure_ascii=False) + "\n"
    return f"{block}\n"


def write_sample(rows: Rows, name: str, folder: str) -> str:
    """Write a recipe's sample into a folder and return its path."""
    path = Path(folder) / name
    path.write_text(sample_text(rows, name), encoding="utf-8")
    return str(path)
