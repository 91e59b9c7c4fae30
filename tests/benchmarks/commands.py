"""Command lines timed in turns, as an installed program runs them: from compiled bytecode."""

from __future__ import annotations

import compileall
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import lorakit

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
    """Run a command in a folder and return its cost; end the benchmark where it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        list(command), env=dict(environment), cwd=folder, capture_output=True, check=False
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.decode(errors='replace')}")
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return Cost(seconds, user + system)


def in_turns(
    commands: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    folder: Path,
    rounds: int,
) -> dict[str, list[Cost]]:
    """Return the costs of each command by its name, every round running all, after one to warm up.

    Every other round runs them in reverse, so that none is always the one that follows another.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        order = list(commands) if number % 2 else list(commands)[::-1]
        for name in order:
            cost = cost_of(commands[name], environment, folder)
            if number:
                costs[name].append(cost)
    return costs


def comparison(
    name: str, unit: str, ours: Sequence[float], peer: Sequence[float], **details: object
) -> dict[str, object]:
    """Return one comparison: medians, and how many times as much the peer takes, round by round."""
    ratios = [theirs / own for own, theirs in zip(ours, peer, strict=True)]
    return {
        "name": name,
        "unit": unit,
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "details": details,
    }


def as_text(result: Mapping[str, object]) -> str:
    """Return a comparison as a line to read."""
    ours, peer, ratio = (float(str(result[name])) for name in ("ours", "peer", "ratio"))
    details = result["details"]
    pairs = details.items() if isinstance(details, Mapping) else ()
    shown = ", ".join(f"{key} {value}" for key, value in pairs)
    return f"{result['name']}: {ours:.3g} {result['unit']}, peer {peer:.3g}: {ratio:.2f}×; {shown}"
