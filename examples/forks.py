"""Run lines of `lorakit` commands, several at a time, in forks of one process.

    printf 'FOLDER lorakit generate a.safetensors --data test.jsonl -o a.jsonl\n' |
        python examples/forks.py [--jobs 2]

Each line is a folder to run in and a command. The libraries are imported once: importing them takes
most of the time of a short command on a small model. Lines that begin with `#` wait for all lines
that begin with fewer of them. Stops at the first command that fails, and names it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys


def run(line: str) -> int:
    """Run one line in a new process and return its process id."""
    folder, program, *arguments = shlex.split(line)
    if program != "lorakit":
        sys.exit(f"not a lorakit command: {line}")
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    sys.argv = [program, *arguments]
    from lorakit.cli import main as lorakit

    try:
        lorakit()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    os._exit(0)


def wait(running: dict[int, str]) -> None:
    """Wait for a child to end; if it failed, stop all others and exit."""
    child, status = os.wait()
    line = running.pop(child)
    if status:
        for other in running:
            os.kill(other, 15)
        sys.exit(f"failed: {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    jobs = parser.parse_args().jobs
    lines = sys.stdin.read().splitlines()
    if not lines:
        return
    import lorakit.merging.adaptive
    import lorakit.merging.lorahub
    import lorakit.models.predictions  # noqa: F401

    running: dict[int, str] = {}
    stage = 0
    for line in lines:
        command = line.lstrip("#")
        while running and (len(running) >= jobs or len(line) - len(command) > stage):
            wait(running)
        stage = max(stage, len(line) - len(command))
        running[run(command)] = command
    while running:
        wait(running)


if __name__ == "__main__":
    main()
