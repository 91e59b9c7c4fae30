"""The installed program, run as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

PROGRAM = str(Path(sys.executable).with_name("lorakit"))
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "error", "COLUMNS": "80"}
ENVIRONMENT.pop("LORAKIT_MODEL", None)


def run(
    *arguments: str,
    stdin: str | int = "",
    stdout: int | IO[Any] = subprocess.PIPE,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `lorakit` with these arguments and a text, or an open file's number, as its stdin."""
    source = {"stdin": stdin} if isinstance(stdin, int) else {"input": stdin}
    return subprocess.run(
        [PROGRAM, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=ENVIRONMENT,
        cwd=cwd,
        check=False,
        **source,
    )


def run_over(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `lorakit` in one process, or in several by torchrun, on the CPU."""
    launch = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m", "--"]
    return subprocess.run(
        [sys.executable, "-m", *(launch if processes > 1 else []), "lorakit", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )


def run_script_over(processes: int, script: Path, *arguments: str) -> list[str]:
    """Run a Python file in several processes by torchrun, on the CPU; return the lines it prints.

    Fails where one of them does.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", str(processes), str(script), *arguments),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds; fail if it does not within the time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script by /bin/sh in a folder, with `lorakit` on the path."""
    path = os.pathsep.join([str(Path(PROGRAM).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        ["/bin/sh", "-c", script],
        cwd=folder,
        env={**ENVIRONMENT, "PATH": path, **variables},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
