<<<<<<< HEAD
"""Asking many questions at once.

It knows no HTTP and nothing of what is asked.
=======
"""Ask many questions at once and keep each answer as it comes, so that a killed run can go on.

This file knows no HTTP and nothing of what is asked; an answer is looked up by a hash of all that
was sent.
>>>>>>> c01eb52 (Ask judges by the openai package, from the extra endpoint)
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

    The first error is raised after the answers that have come before it. The threads are not
    waited for then: Ctrl-C should not hang on answers that nobody will read.
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
            except BaseException as error:  # raised again in the thread that asked
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
<<<<<<< HEAD
=======


def question_key(*parts: object) -> str:
    """Return the hash that identifies a question: of where it is sent and all that it says."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class AnswerFile:
    """Answers by question_key, each also a line of a file beside `output` until that is done.

    Without `output` nothing is kept. With `resume` the answers that an earlier run left are there;
    a line cut short is dropped. Questions that have changed since have another key.
    """

    def __init__(self, output: str | None, *, resume: bool) -> None:
        self.known: dict[str, str] = {}
        self._side: Path | None = None
        self._stream: Any = None
        if output is not None:
            final = Path(os.path.realpath(output))
            self._side = final.with_name(f".{final.name}.answers.part")
            self._open(self._side, resume)

    def _open(self, side: Path, resume: bool) -> None:
        try:
            text = side.read_bytes() if resume and side.exists() else b""
            whole = text[: text.rfind(b"\n") + 1]
            self.known = dict(map(_read_line, whole.splitlines()))
            self._stream = open(side, "ab")  # noqa: SIM115 - open until __exit__
            self._stream.truncate(len(whole))
        except OSError as error:
            raise LorakitError(
                f"cannot write {side}: {explain(error)}; choose another -o"
            ) from None
        except (ValueError, TypeError):
            raise LorakitError(f"{side} is not what judge wrote; run without --resume") from None

    def add(self, key: str, answer: str) -> None:
        """Keep an answer, in the file before the next is taken."""
        self.known[key] = answer
        if self._side is not None:
            try:
                self._stream.write(json.dumps([key, answer]).encode() + b"\n")
                self._stream.flush()
            except OSError as error:
                raise _cannot_keep(self._side, error) from None

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; where there was no error, the output is written, and the file goes."""
        if self._side is not None:
            with contextlib.suppress(OSError):  # a full disk was told of before
                self._stream.close()
            if error is None:
                self._side.unlink(missing_ok=True)


def _read_line(line: bytes) -> tuple[str, str]:
    key, answer = json.loads(line)
    if not isinstance(key, str) or not isinstance(answer, str):
        raise ValueError("not a line of AnswerFile.add")
    return key, answer


def _cannot_keep(side: Path, error: OSError) -> LorakitError:
    return LorakitError(f"cannot write {side}: {explain(error)}; choose another -o")
>>>>>>> c01eb52 (Ask judges by the openai package, from the extra endpoint)
