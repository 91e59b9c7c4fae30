"""The installed program, run as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = str(Path(sys.executable).with_name("lorakit"))
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "error", "COLUMNS": "80"}
ENVIRONMENT.pop("LORAKIT_MODEL", None)


def run(*arguments: str, stdin: str | bytes = b"", **more: Any) -> subprocess.CompletedProcess[str]:
    """Run `lorakit` with these arguments; what it writes must be UTF-8."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    settings: dict[str, Any] = {"input": data, "stdout": subprocess.PIPE, **more}
    if "stdin" in settings:
        del settings["input"]
    done = subprocess.run(
        [PROGRAM, *arguments], stderr=subprocess.PIPE, env=ENVIRONMENT, check=False, **settings
    )
    out = "" if done.stdout is None else done.stdout.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, done.stderr.decode())


def shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script by /bin/sh in a folder, with `lorakit` on the path; its code is the last's."""
    path = os.pathsep.join([str(Path(PROGRAM).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        ["/bin/sh", "-c", script],
        cwd=folder,
        env={**ENVIRONMENT, "PATH": path, **variables},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
