"""Asking many questions at once.

It knows no HTTP and nothing of what is asked.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Q = TypeVar("Q")


def ask_all(
    questions: Sequence[Q], ask: Callable[[Q], str], *, concurrency: int
) -> Iterator[tuple[Q, str]]:
    """Yield each question with its answer as they come, at most `concurrency` asked at a time.

    The first error ends it, after the answers that are there. The threads are left to themselves
    then: Ctrl-C does not wait for answers that nobody will read.
    """
    waiting: queue.SimpleQueue[Q] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Q, str, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for question in questions:
        waiting.put(question)

    def work() -> None:
        while not stopped.is_set():
            try:
                question = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((question, ask(question), None))
            except BaseException as error:  # handed to the thread that can say it
                done.put((question, "", error))
                return

    for _ in range(min(concurrency, len(questions))):
        threading.Thread(target=work, daemon=True).start()
    failed: BaseException | None = None
    try:
        for _ in questions:
            if failed is not None and done.empty():
                break
            question, answer, error = done.get()
            failed = failed or error
            if failed is not None:
                stopped.set()
            if error is None:
                yield question, answer
    finally:
        stopped.set()
    if failed is not None:
        raise failed
