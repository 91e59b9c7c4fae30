"""Which of several processes this is, where torchrun or `accelerate launch` started it."""

from __future__ import annotations

import os

_SET_BY_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def process_count() -> int:
    """Return how many processes the launcher started, 1 without one."""
    return _number("WORLD_SIZE", 1)


def is_first_process() -> bool:
    """Return whether this is the process that writes and reports."""
    return process_count() == 1 or _number("RANK", 0) == 0


def leave_others() -> None:
    """Forget the other processes, so that nothing waits for them."""
    for name in _SET_BY_LAUNCHERS:
        os.environ.pop(name, None)


def _number(name: str, default: int) -> int:
    """Return a variable of the launcher's; what is no number is none of a launcher's."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default
