"""A target for atheris: any bytes, as an adapter file, are read or refused by a LorakitError.

    pip install atheris
    python -m tests.fuzz.headers -runs=100000

Coverage guides it, which mutations.py has not. Its options are libFuzzer's.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError


def read(data: bytes) -> None:
    """Read bytes as a file of tensors and, in place of their header, as one of an adapter."""
    from lorakit.adapters.safetensors import read_tensors
    from lorakit.adapters.storage import build_adapter

    for content in (data, len(data).to_bytes(8, "little") + data + bytes(64)):
        try:
            tensors, metadata = read_tensors(content, "x")
            _ = build_adapter(tensors, metadata, None, "x").sha256
        except LorakitError:
            pass


def write_seeds(folder: Path) -> None:
    """Write the header of a small adapter, and a whole file, for the fuzzer to begin with."""
    from lorakit.adapters.storage import save_adapter
    from tests.support.adapters import tiny

    content = Path(save_adapter(tiny(layers=1), f"{folder}/whole.safetensors")).read_bytes()
    length = int.from_bytes(content[:8], "little")
    (folder / "header").write_text(json.dumps(json.loads(content[8 : 8 + length])), "utf-8")


def main() -> None:
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["lorakit"]):
        importlib.import_module("lorakit.adapters.storage")
    with tempfile.TemporaryDirectory() as folder:
        write_seeds(Path(folder))
        atheris.Setup([*sys.argv, folder], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
