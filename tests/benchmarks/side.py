"""One side of a benchmark in a process of its own, whose memory nothing else has touched.

    python -m tests.benchmarks.side MODULE FUNCTION ARGUMENTS

calls a function of a module with the arguments, a JSON object, and prints what it returns as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.result import BenchmarkError

ROOT = Path(__file__).resolve().parents[2]


def in_process(
    function: Callable[..., dict[str, Any]],
    arguments: Mapping[str, object],
    *,
    processes: int = 1,
    limit: float | None = None,
) -> list[dict[str, Any]]:
    """Return what a function returns in a process of its own, or in several by torchrun.

    Raises BenchmarkError with the last line of its stderr, all of which is printed, where it fails,
    or takes more than `limit` seconds.
    """
    launch = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m", "--"]
    module = importlib.import_module(function.__module__).__spec__
    name = module.name if module else function.__module__
    command = [sys.executable, "-m", *(launch if processes > 1 else []), __name__]
    try:
        done = subprocess.run(
            [*command, name, function.__name__, json.dumps(dict(arguments))],
            env={**os.environ, **({} if processes == 1 else {"ACCELERATE_USE_CPU": "true"})},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{function.__name__} took more than {limit:.0f} s") from None
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise BenchmarkError(_last_line(done.stderr) or f"it ended with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def main() -> None:
    module, function, arguments = sys.argv[1:]
    found = getattr(importlib.import_module(module), function)
    sys.stdout.write(json.dumps(found(**json.loads(arguments))) + "\n")


if __name__ == "__main__":
    main()
