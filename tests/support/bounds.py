"""Runs of the program whose processor time and memory are measured and bounded."""

from __future__ import annotations

import json
import subprocess
import sys
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


# Run in a process of its own, since a child's memory counts that of the process it was forked from.
_RUN = """
import json, os, resource, subprocess, sys
process = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
resource.prlimit(process.pid, resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
_, status, usage = os.wait4(process.pid, 0)
code = os.waitstatus_to_exitcode(status)
print(json.dumps([code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
"""


def measured(*arguments: str, cwd: Path) -> Measured:
    """Run `lorakit` with these arguments; a run that does not end is ended."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _RUN, str(_LONGEST), PROGRAM, *arguments],
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        cwd=cwd,
        check=False,
    )
    code, seconds, memory = json.loads(done.stdout)
    return Measured(code, done.stderr, seconds, memory)
