"""Several processes of one run as threads of the test: quick to start, and one at a time runs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import accelerate
import pytest

from lorakit.models import sharing
from lorakit.models.sharing import Team
from lorakit.runs.processes import LostProcessError

T = TypeVar("T")
R = TypeVar("R")


class Threads:
    """Threads that stand for the processes of a team; only the one whose turn it is runs.

    A turn ends where a thread waits for the values of the others, so that what is global to a
    process, such as torch's seed, is no other thread's meanwhile.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._turn = threading.Lock()
        self._meeting = threading.Barrier(count, timeout=120)
        self._values: list[Any] = [None] * count
        self._own = threading.local()

    @property
    def number(self) -> int:
        return int(self._own.number)

    def exchange(self, value: T) -> list[T]:
        self._values[self.number] = value
        self._turn.release()
        try:
            self._meeting.wait()
            values = copy.deepcopy(self._values)  # each process has its own
            self._meeting.wait()
        except threading.BrokenBarrierError:
            raise LostProcessError("another process of this run has ended; see it") from None
        finally:
            self._turn.acquire()
        return values

    def run(self, work: Callable[[Team], R]) -> list[R | Exception]:
        """Return, by thread, what `work` returns, or the exception that it raises."""

        def run_as(number: int) -> R | Exception:
            self._own.number = number
            with self._turn:
                try:
                    return work(Team(self.count, number, self.exchange))
                except Exception as error:
                    self._meeting.abort()
                    return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(run_as, range(self.count)))


def run_as_team(count: int, work: Callable[[Team], R]) -> list[R]:
    """Return what `work` returns in each of so many processes; raise what one of them raises."""
    results: list[R] = []
    for result in Threads(count).run(work):
        if isinstance(result, Exception):
            raise result
        results.append(result)
    return results


def run_launched(count: int, work: Callable[[], R]) -> list[R]:
    """Return what `work` returns in each of so many processes that accelerate has connected."""
    threads = Threads(count)

    def connected(**options: object) -> SimpleNamespace:
        return SimpleNamespace(
            num_processes=count,
            process_index=threads.number,
            is_main_process=threads.number == 0,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(count))
        patch.setattr(accelerate, "Accelerator", connected)
        patch.setattr(sharing, "exchange", threads.exchange)
        results = threads.run(lambda team: work())
    failed = [result for result in results if isinstance(result, Exception)]
    if failed:
        raise failed[0]
    return [result for result in results if not isinstance(result, Exception)]
