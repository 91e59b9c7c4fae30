"""Runs of the program whose processor time and memory are measured and bounded."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.support.program import ENVIRONMENT, PROGRAM

_LONGEST = 60  # seconds of processor time after which a run is ended


class Measured(NamedTuple):
    """How a run ended, what it wrote to stderr, and the time (s) and memory (bytes) it took."""

    code: int
    stderr: str
    seconds: float
    memory: int


def measured(*arguments: str, cwd: Path) -> Measured:
    """Run `lorakit` with these arguments; a run that does not end is ended."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=ENVIRONMENT,
            cwd=cwd,
        )
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (_LONGEST, _LONGEST))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        stderr.seek(0)
        text = stderr.read().decode()
    return Measured(
        process.returncode, text, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    )
