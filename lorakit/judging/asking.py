"""Ask many questions at once.

This file knows nothing of HTTP, nor of what is asked.
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
    """Yield each question with its answer as it comes, asking at most `concurrency` at a time.

    The first error is raised after the answers that have already come. Threads that still wait are
    abandoned, so that Ctrl-C does not wait for answers that nobody will read.
    """
    waiting: queue.SimpleQueue[Q] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[tuple[Q, str, BaseException | None]] = queue.SimpleQueue()
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
                outcomes.put((question, ask(question), None))
            except BaseException as error:  # raised below, in the caller's thread
                outcomes.put((question, "", error))
                return

    for _ in range(min(concurrency, len(questions))):
        threading.Thread(target=work, daemon=True).start()
    failed: BaseException | None = None
    try:
        for _ in questions:
            if failed is not None and outcomes.empty():
                break
            question, answer, error = outcomes.get()
            failed = failed or error
            if failed is not None:
                stopped.set()
            if error is None:
                yield question, answer
    finally:
        stopped.set()
    if failed is not None:
        raise failed
