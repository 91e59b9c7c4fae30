"""Signals that end the program: they become exceptions, so that what was begun is tidied up.

SIGTERM and SIGHUP raise Terminated as Ctrl-C raises KeyboardInterrupt, where the program asked for
it (`terminating`). What must not be torn apart, such as an optimiser step, runs in `deferred`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from lorakit.runs.processes import LostProcessError

_TERMINATING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Terminated(BaseException):
    """The process has been asked to end, by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


STOPPED = (KeyboardInterrupt, Terminated)  # what ends a run from outside


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise Terminated inside the block.

    A signal that is ignored, as SIGHUP under nohup, stays so. Only the main thread gets signals;
    in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, _terminate)
        for number in _TERMINATING
        if signal.getsignal(number) is signal.SIG_DFL
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP take effect at the end of the block; a second Ctrl-C at once.

    A signal that would end the process without an exception does so, as it does outside. Of several
    processes that get one, another may end first: then the signal is what ended this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *_TERMINATING)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}

    def remember(number: int, frame: FrameType | None) -> None:
        if waiting and number == signal.SIGINT:
            raise KeyboardInterrupt
        waiting.append(number)

    lost: LostProcessError | None = None
    for number in handlers:
        signal.signal(number, remember)
    try:
        yield
    except LostProcessError as error:
        lost = error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in waiting[:1]:
        handler = handlers[number]
        if callable(handler):
            handler(number, None)
    if lost is not None:
        raise lost
