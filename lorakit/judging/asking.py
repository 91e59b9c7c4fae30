"""Ask many questions at once.

This file knows nothing of HTTP, nor of what is asked.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Q = TypeVar("Q")
A = TypeVar("A")
WINDOW = 32  # questions, for each that may be asked at a time, among which answers may wait


def ask_all(
    questions: Sequence[Q], ask: Callable[[Q], A], *, concurrency: int
) -> Iterator[tuple[Q, A]]:
    """Yield each question with its answer as it comes, asking at most `concurrency` at a time.

    The first error is raised after the answers that have already come. Threads that still wait are
    abandoned, so that Ctrl-C does not wait for answers that nobody will read.
    """
    waiting: queue.SimpleQueue[Q] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[tuple[Q, A] | BaseException] = queue.SimpleQueue()
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
                outcomes.put((question, ask(question)))
            except BaseException as error:  # handed to the thread that can say it
                outcomes.put(error)
                return

    for _ in range(min(concurrency, len(questions))):
        threading.Thread(target=work, daemon=True).start()
    failed: BaseException | None = None
    try:
        for _ in questions:
            if failed is not None and outcomes.empty():
                break
            answered = outcomes.get()
            if isinstance(answered, BaseException):
                failed = failed or answered
                stopped.set()
            else:
                yield answered
    finally:
        stopped.set()
    if failed is not None:
        raise failed


def ask_in_order(
    questions: Iterable[Q], ask: Callable[[Q], A], *, concurrency: int
) -> Iterator[tuple[Q, A]]:
    """Yield each question with its answer in the questions' order, which are read as needed.

    An answer waits until those before it are there. The first error ends it, after the answers that
    need not wait.
    """

    def ask_numbered(numbered: tuple[int, Q]) -> A:
        return ask(numbered[1])

    iterator = iter(questions)
    while window := list(enumerate(itertools.islice(iterator, WINDOW * concurrency))):
        waiting: dict[int, tuple[Q, A]] = {}
        following = 0
        for (number, question), answer in ask_all(window, ask_numbered, concurrency=concurrency):
            waiting[number] = question, answer
            while following in waiting:
                yield waiting.pop(following)
                following += 1
