"""Runs that torchrun or `accelerate launch` starts: really several, stopped, gone on with, failing.

All of it takes minutes: each launcher starts torch in every process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.program import run_over, wait_for
from tests.support.training_data import rows, save_rows

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch"]
LAUNCHERS = {
    "torchrun": [*TORCHRUN, "-m", "--"],
    "accelerate on a CPU": [*ACCELERATE, "--cpu", "--num_processes", "2", "-m"],
    "accelerate": [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "-m"],
}
TRAINING = ["--epochs", "2", "--dropout", "0", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows(40))


def launch(launcher: list[str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(stderr: str) -> list[str]:
    """Return what lorakit, not the launcher, said at the end of a run."""
    return [line for line in stderr.splitlines() if line.startswith(("Error: ", "Terminated!"))]


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS.keys())
def test_two_processes_are_really_two_and_write_the_bytes_of_one(
    llama: str, data: str, tmp_path: Path, launcher: list[str]
) -> None:
    command = ["train-adapter", "--model", llama, "--data", data, *TRAINING]
    one, two = (str(tmp_path / f"{count}.safetensors") for count in (1, 2))
    assert run_over(1, *command, "-o", one).returncode == 0
    process = launch(launcher, "lorakit", *command, "-o", two)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert stderr.count("Note: 2 processes share batches of at most 1 micro-batch; ") == 1
    assert stderr.count("Note: wrote ") == 1
    assert Path(one).read_bytes() == Path(two).read_bytes()


def test_a_training_that_is_terminated_goes_on_to_the_same_bytes(
    llama: str, data: str, tmp_path: Path
) -> None:
    """With dropout, whose masks depend on the number of processes, and on nothing else."""
    command = ["train-adapter", "--model", llama, "--data", data, *TRAINING, "--dropout", "0.1"]
    command += ["--epochs", "10", "--micro-batch-tokens", "60", "--checkpoint-every", "1"]
    whole, broken = (str(tmp_path / f"{name}.safetensors") for name in ("whole", "broken"))
    assert run_over(2, *command, "-o", whole).returncode == 0
    process = launch(LAUNCHERS["torchrun"], "lorakit", *command, "-o", broken)
    wait_for(Path(f"{broken}.resume").exists, 300)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode != 0
    assert len(ends(stderr)) == 1, stderr
    assert not Path(broken).exists()
    done = run_over(2, *command, "-o", broken, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("going on after ") == 1
    assert Path(whole).read_bytes() == Path(broken).read_bytes()


def test_generation_that_is_terminated_goes_on_in_one_process(
    llama: str, data: str, tmp_path: Path
) -> None:
    command = ["generate", "--model", llama, "--data", data, "--batch-size", "1", "--device", "cpu"]
    command += ["--max-new-tokens", "40", "--temperature", "1", "--samples", "2"]
    one, two = (tmp_path / f"{count}.jsonl" for count in (1, 2))
    assert run_over(1, *command, "-o", str(one)).returncode == 0
    process = launch(LAUNCHERS["torchrun"], "lorakit", *command, "-o", str(two))
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob(".2.jsonl.*.part")), 300)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    done = run_over(1, *command, "-o", str(two), "--resume")
    assert "going on after " in done.stderr
    assert two.read_bytes() == one.read_bytes()
    done = run_over(2, *command)
    assert done.stdout == one.read_text()


FAILING = """
import os
from lorakit import cli
from lorakit.errors import LorakitError
from lorakit.training.trainer import Trainer

step = Trainer._step
def broken(self, *arguments):
    if os.environ["RANK"] == "1" and self.progress.step:
        raise LorakitError("its disk is full; free some space")
    return step(self, *arguments)
Trainer._step = broken
cli.main()
"""


def test_what_one_process_alone_has_met_is_said_once_and_a_checkpoint_is_left(
    llama: str, data: str, tmp_path: Path
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    command = ["train-adapter", "--model", llama, "--data", data, *TRAINING]
    output = str(tmp_path / "a.safetensors")
    process = launch(TORCHRUN, str(script), *command, "-o", output)
    _, stderr = process.communicate()
    assert process.returncode != 0
    assert ends(stderr) == ["Error: its disk is full; free some space (process 1 of 2)"]
    assert Path(f"{output}.resume").exists()


def test_what_all_processes_have_met_is_said_once(llama: str, tmp_path: Path) -> None:
    arguments = ["generate", "--model", llama, "--data", str(tmp_path / "none.jsonl")]
    done = run_over(2, *arguments, "--device", "cpu")
    assert done.returncode != 0
    (end,) = ends(done.stderr)
    assert "none.jsonl" in end
    assert "(process " not in end
