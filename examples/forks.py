"""Run lines of `lorakit` commands, several at a time, in forks of one process.

    printf 'FOLDER lorakit generate a.safetensors --data test.jsonl -o a.jsonl\n' |
        python examples/forks.py [--jobs 2] [--keep-going] [--verbose]

Each line is a folder to run in and a command; the same line twice is one. The libraries are
imported once: importing them takes most of the time of a short command on a small model. A command
waits for those that write (`-o`) what it reads, and else they start in their order. Stops at the
first command that fails and names it, or with --keep-going runs all that do not need what failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Command:
    """A `lorakit` command, the file it writes, and those that it reads from other commands."""

    line: str
    folder: str
    arguments: list[str]
    output: str
    needs: set[str] = field(default_factory=set)
    begun: float = 0.0


def parse(line: str) -> Command:
    """Return a line as a command."""
    folder, program, *arguments = shlex.split(line)
    if program != "lorakit" or "-o" not in arguments[:-1]:
        sys.exit(f"not a lorakit command with -o: {line}")
    name = arguments[arguments.index("-o") + 1]
    return Command(line, folder, arguments, place_of(folder, name))


def place_of(folder: str, name: str) -> str:
    return os.path.realpath(os.path.join(folder, name))


def find_needs(commands: Sequence[Command]) -> None:
    """Note what each command reads of what the others write, in any argument or part of one."""
    outputs = {command.output for command in commands}
    for command in commands:
        parts = {part for argument in command.arguments for part in re.split("[=,]", argument)}
        read = {place_of(command.folder, part) for part in parts}
        command.needs = (read & outputs) - {command.output}


def start(command: Command) -> int:
    """Run a command in a new process and return its process id."""
    command.begun = time.monotonic()
    child = os.fork()
    if child:
        return child
    os.chdir(command.folder)
    sys.argv = ["lorakit", *command.arguments]
    from lorakit.cli import main as lorakit

    try:
        lorakit()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    os._exit(0)


def run_all(commands: list[Command], jobs: int, *, keep_going: bool, verbose: bool) -> list[str]:
    """Run the commands; return the lines of those that failed or lacked what these write."""
    failed: dict[str, str] = {}  # by the output that is missing
    waiting = {command.output for command in commands}
    running: dict[int, Command] = {}
    while commands or running:
        lacking = [command for command in commands if command.needs & failed.keys()]
        if lacking:
            commands = [command for command in commands if command not in lacking]
            failed |= {command.output: command.line for command in lacking}
            continue
        ready = [command for command in commands if not command.needs & waiting]
        if ready and len(running) < jobs:
            commands.remove(ready[0])
            running[start(ready[0])] = ready[0]
            continue
        if not running:
            if commands:
                sys.exit(f"waits for itself: {commands[0].line}")
            continue
        child, status = os.wait()
        done = running.pop(child)
        waiting.discard(done.output)
        if verbose:
            print(
                f"{time.monotonic() - done.begun:.1f} s: {done.line}", file=sys.stderr, flush=True
            )
        if status:
            failed[done.output] = done.line
            if not keep_going:
                for other in running:
                    os.kill(other, 15)
                break
    return list(failed.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep-going", action="store_true", help="run what needs nothing failed")
    parser.add_argument(
        "--verbose", action="store_true", help="the seconds of each command, on stderr"
    )
    options = parser.parse_args()
    commands = [parse(line) for line in dict.fromkeys(sys.stdin.read().splitlines())]
    if not commands:
        return
    find_needs(commands)
    import lorakit.merging.adaptive
    import lorakit.merging.lorahub
    import lorakit.models.predictions  # noqa: F401

    failed = run_all(commands, options.jobs, keep_going=options.keep_going, verbose=options.verbose)
    if failed:
        sys.exit("failed: " + "\nfailed: ".join(failed))


if __name__ == "__main__":
    main()
