"""A process of a distributed run that is killed ends the others in one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

_KILLED = """
import os, signal, sys
from lorakit.training.trainer import Trainer
from lorakit import cli

if os.environ["RANK"] == "1":
    step = Trainer._step
    def killed(self, *arguments):
        step(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    Trainer._step = killed
cli.main()
"""


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_1_and_one_line(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Say a:", "completion": " a"}\n' * 64)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["train-adapter", "--data", str(data), "-o", str(tmp_path / "a.safetensors"), "-q"]
    common = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", _KILLED, *options, "--model", "tiny", "--device", "cpu"]
    runs = [
        subprocess.Popen(
            command,
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [1, -9], errors
    lines = [line for line in errors[0].splitlines() if line.startswith("Error: ")]
    assert lines == [line for line in lines if line.startswith("Error: another process of this")]
    assert len(lines) == 1
    assert "Traceback" not in errors[0]
