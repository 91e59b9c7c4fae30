"""What a killed run needs to go on: files beside its output that live until the output is done.

Training saves a checkpoint (training/checkpoint.py), generation the finished lines of its output,
judging and searching the values they have computed. All are named after the output, and what they
hold counts only for a run with the same settings, data and adapters: `run_key` hashes all of those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

from lorakit.errors import LorakitError
from lorakit.files import cannot_write, is_stream, refuse_directory, sync

T = TypeVar("T")


def run_key(*shaping: object) -> str:
    """Return the hash of everything that shapes a run, given as JSON values."""
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()


def beside(output: str, suffix: str) -> Path | None:
    """Return the path of a file beside `output`, named after it; None where that is a stream."""
    return None if is_stream(output) else Path(f"{output.rstrip('/')}.{suffix}")


def hidden_beside(output: str, suffix: str) -> Path:
    """Return the path of a hidden file beside what `output` is, or links to."""
    final = Path(os.path.realpath(output))
    return final.with_name(f".{final.name}.{suffix}")


class OutputLines:
    """A text output that is written under another name first and can be continued after a kill.

    The side file bears `key`, so that only a run of the same kind continues it. `lines` are the
    whole lines that an earlier run left; one that was cut short is dropped.
    """

    def __init__(self, output: str, key: str, *, resume: bool) -> None:
        self.final = Path(os.path.realpath(output))
        self._side = hidden_beside(output, f"{key[:12]}.part")
        whole = _whole_lines(self._side, "generate") if resume else ""
        self.lines = [f"{line}\n" for line in whole.split("\n")[:-1]]

    @contextlib.contextmanager
    def writing(self, keep: int) -> Iterator[IO[str]]:
        """Yield a stream that continues after the first `keep` lines.

        The file takes its final name once the block ends without an error.
        """
        try:
            refuse_directory(self.final)
            with open(self._side, "a", encoding="utf-8", newline="\n") as stream:
                stream.truncate(len("".join(self.lines[:keep]).encode()))
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(self._side, self.final)
            sync(self.final.parent)
        except OSError as error:
            raise cannot_write(self.final, error) from error


class SavedValues:
    """JSON values of a run, by name, each also a line of a file until the run is done.

    As a context it deletes the file where the block ends without an error and else leaves it for a
    resumed run. With `resume` the values of an earlier run are there, otherwise they are dropped.
    Without a `path` nothing is kept; of several processes only the one that `writes` keeps them.
    What `find` keeps counts only for a run of the same `key`. `writer` is the command, for the
    message about a file that something else wrote.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        resume: bool,
        writer: str,
        writes: bool = True,
        key: str = "",
    ) -> None:
        self._path = path
        self._key = key
        self._writes = writes and path is not None
        self._writer = writer
        self._stream: IO[bytes] | None = None
        self._size = 0
        self.known: dict[str, object] = {}
        if path is not None and resume:
            whole = _whole_lines(path, writer)
            self._size = len(whole.encode())
            self.known = dict(self._parsed(line) for line in whole.split("\n")[:-1])
        elif path is not None and writes and path.exists():
            path.write_bytes(b"")

    def add(self, name: str, value: object) -> None:
        """Keep a value, in the file before the next one is computed."""
        self.known[name] = value
        if self._path is None or not self._writes:
            return
        try:
            if self._stream is None:
                self._stream = open(self._path, "ab")  # noqa: SIM115 - open until `close`
                self._stream.truncate(self._size)
            self._stream.write(json.dumps([name, value]).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise cannot_write(self._path, error) from None

    def find(self, name: str, kind: type[T], compute: Callable[[], list[T]]) -> list[T]:
        """Return the list of this name, of values of one kind; where it is not known, compute it.

        Raises LorakitError where the file holds something else under this name.
        """
        name = f"{self._key}{name}"
        if name not in self.known:
            self.add(name, compute())
        values = self.known[name]
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise _foreign(self._path, self._writer)
        return values

    def __enter__(self) -> SavedValues:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # a full disk was reported by `add`
                self._stream.close()
        if error is None and self._path is not None and self._writes:
            self._path.unlink(missing_ok=True)

    def _parsed(self, line: str) -> tuple[str, object]:
        try:
            name, value = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            raise _foreign(self._path, self._writer) from None
        if not isinstance(name, str):
            raise _foreign(self._path, self._writer)
        return name, value


def _whole_lines(path: Path, writer: str) -> str:
    """Return the text of a side file up to its last line end; "" where there is no file."""
    try:
        content = path.read_bytes() if path.exists() else b""
        return content[: content.rfind(b"\n") + 1].decode()
    except OSError as error:
        raise cannot_write(path, error) from None
    except UnicodeDecodeError:
        raise _foreign(path, writer) from None


def _foreign(path: Path | None, writer: str) -> LorakitError:
    return LorakitError(f"{path} is not what {writer} wrote; run without --resume")
