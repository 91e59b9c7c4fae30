"""Which of several processes this is, where torchrun or `accelerate launch` started it.

The first one alone reads pipes, writes and speaks. What the others print goes nowhere, and they end
without a word where the first one has the word.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence

from lorakit.errors import LorakitError

_SET_BY_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
# What tells a process its place: torchrun's, and those of MPI that accelerate reads.
_RANKED = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
}
_PATIENCE = 10.0  # seconds for which a process that has failed waits for the first one


class LostProcessError(LorakitError):
    """Another process of the run has ended, so that what is shared out cannot go on."""


def process_count() -> int:
    """Return how many processes the launcher started, 1 without one."""
    return _number("WORLD_SIZE", 1)


def is_first_process() -> bool:
    """Return whether this is the process that writes and reports."""
    return process_count() == 1 or _number("RANK", 0) == 0


def keep_silent() -> None:
    """Let nothing of this process reach stdout, and signals end it at once: it tidies nothing up.

    It is one of several and not the first.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def signed(line: str) -> str:
    """Return a line with the number of this process, counted from 0."""
    return f"{line} (process {_number('RANK', 0)} of {process_count()})"


def wait_for_first() -> None:
    """Wait, as a process that has failed, for the first one to say why, if it has failed too.

    The launcher then ends this one. It returns where what went wrong is this process's own.
    """
    time.sleep(_PATIENCE)


def start_all_of_accelerate() -> None:
    """Become torchrun with the processes that `accelerate launch --cpu` was asked for.

    On one machine of CPUs it starts a single process, whatever its --num_processes says, of which
    only the address to meet at is left. The number is read from its command line. Raises
    LorakitError where it does not stand there.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not on_cpu or "MASTER_PORT" not in os.environ or _RANKED & os.environ.keys():
        return
    count = asked_processes(_command_line_of(os.getppid()))
    if count is None:
        raise LorakitError(
            "accelerate launch --cpu starts a single process; give it --num_processes N, or run: "
            "torchrun --nproc-per-node N -m lorakit …"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "--"]
    os.execv(sys.executable, [sys.executable, "-m", *launch, "lorakit", *sys.argv[1:]])


def asked_processes(command_line: Sequence[str]) -> int | None:
    """Return the --num_processes of a command line of `accelerate launch`, None without one."""
    words = [word for text in command_line for word in text.split("=", 1)]
    for name, value in itertools.pairwise(words):
        if name in ("--num_processes", "--num-processes") and value.isdecimal():
            return int(value)
    return None


def _command_line_of(process: int) -> list[str]:
    """Return the command line of a process; empty where it cannot be read."""
    import psutil  # which accelerate requires

    try:
        return list(psutil.Process(process).cmdline())
    except psutil.Error:
        return []


def leave_others() -> None:
    """Forget the other processes, so that nothing waits for them."""
    for name in _SET_BY_LAUNCHERS:
        os.environ.pop(name, None)


def _number(name: str, default: int) -> int:
    """Return a variable of the launcher's; what is no number is none of a launcher's."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default
