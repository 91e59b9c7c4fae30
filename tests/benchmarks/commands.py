"""Command lines timed in turns, as an installed program runs them: from compiled bytecode."""

from __future__ import annotations

import compileall
import functools
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import lorakit
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.result import BenchmarkError, Result
from tests.benchmarks.rounds import all_in_turns, ratio_of

LORAKIT = (sys.executable, "-m", "lorakit")


class Cost(NamedTuple):
    """What a command took: seconds by the clock and of processor time, its children's included."""

    seconds: float
    processor: float

    def __add__(self, other: tuple[object, ...]) -> Cost:
        """Return the cost of both commands, one after the other."""
        return Cost(*(float(a) + float(str(b)) for a, b in zip(self, other, strict=True)))


def install(folder: Path) -> dict[str, str]:
    """Copy the package into a folder, compiled, and return the environment that runs it there."""
    copy = folder / "lorakit"
    shutil.copytree(Path(lorakit.__file__).parent, copy)
    compileall.compile_dir(copy, quiet=1)
    return {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}


def cost_of(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Cost:
    """Run a command in a folder and return its cost; raise BenchmarkError where it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        list(command), env=dict(environment), cwd=folder, capture_output=True, check=False
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise BenchmarkError(f"{' '.join(command[:4])}: {lines[-1] if lines else done.returncode}")
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return Cost(seconds, user + system)


def costs_in_turns(
    commands: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    folder: Path,
    rounds: int,
) -> dict[str, list[Cost]]:
    """Return the costs of each command by its name, every round running all, after one to warm up.

    Every other round runs them in reverse, so that none is always the one that follows another.
    """
    sides = {
        name: functools.partial(cost_of, command, environment, folder)
        for name, command in commands.items()
    }
    return {name: costs[1:] for name, costs in all_in_turns(sides, rounds + 1).items()}


def compared(
    name: str, ours: Sequence[Cost], peer: Sequence[Cost], details: Mapping[str, object]
) -> Result:
    """Return the result of commands in turns: by the clock, and in processor time as a detail.

    `name` may hold a second part, after a colon.
    """
    ratio = ratio_of([cost.seconds for cost in ours], [cost.seconds for cost in peer])
    processor = ratio_of([cost.processor for cost in ours], [cost.processor for cost in peer])
    return Result(
        name=name,
        unit="s, of whole processes",
        ours=min(cost.seconds for cost in ours),
        peer=min(cost.seconds for cost in peer),
        ratio=ratio.median,
        spread=ratio.spread,
        machine=describe_machine(torch.device("cpu"), torch.float32),
        details={
            "processor ratio": processor.median,
            "processor seconds": min(cost.processor for cost in ours),
            "processor seconds of the peer": min(cost.processor for cost in peer),
            **details,
        },
    )
