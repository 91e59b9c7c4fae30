"""What a killed run needs to resume: files beside its output that are deleted once it is complete.

Training saves a checkpoint (training/checkpoint.py), as measuring importance does; generation and
data sets the finished lines of their output; judging, searching and BERTScore the values they have
computed. All are named after the output, and are used only by a run with the same settings, data
and adapters, all of which `run_key` hashes. One run at a time writes an output (sole_writer.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

from lorakit.errors import LorakitError
from lorakit.files import (
    cannot_write,
    delete_siblings,
    hidden_path_beside,
    is_stream,
    mode_of,
    open_text_output,
    refuse_directory,
    sync,
)
from lorakit.runs.signals import deferred
from lorakit.runs.sole_writer import sole_writer

T = TypeVar("T")


def run_key(*shaping: object) -> str:
    """Return a hash of everything that shapes a run, passed as JSON values."""
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()


def path_beside(output: str, suffix: str) -> Path | None:
    """Return the path of a file beside `output`, named after it; None if that is a stream."""
    return None if is_stream(output) else Path(f"{output.rstrip('/')}.{suffix}")


class OutputLines:
    """A text output written under a temporary name, which a resumed run can continue.

    The name of the side file contains `key`, so that only the same run continues it. `lines` are
    the complete lines that an earlier run left; one that was cut short is dropped.
    """

    def __init__(self, output: str, key: str, *, resume: bool, writer: str = "generate") -> None:
        self.final = Path(os.path.realpath(output))
        self.side = hidden_path_beside(output, f"{key[:12]}.part")
        whole = _whole_lines(self.side, writer) if resume else ""
        self.lines = [f"{line}\n" for line in whole.split("\n")[:-1]]

    def drop(self) -> None:
        """Delete the side file."""
        self.side.unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self, keep: int) -> Iterator[IO[str]]:
        """Yield a stream that continues after the first `keep` lines.

        The file takes its final name once the block ends without an error.
        """
        try:
            refuse_directory(self.final)
            with open(self.side, "a", encoding="utf-8", newline="\n") as stream:
                stream.truncate(len("".join(self.lines[:keep]).encode()))
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(self.side, mode_of(self.final))
            os.replace(self.side, self.final)
            sync(self.final.parent)
        except OSError as error:
            raise cannot_write(self.final, error) from error


@contextlib.contextmanager
def continuing(
    output: str,
    key: str,
    *,
    resume: bool,
    multiple: int = 1,
    writer: str = "generate",
    survives_errors: bool = True,
) -> Iterator[tuple[IO[str], list[str]]]:
    """Yield an output's stream and the lines that an earlier run left, a multiple of so many.

    A pipe or a device keeps none. Without `resume`, what earlier runs left is dropped. A killed run
    leaves its lines; one that ends with a LorakitError does if they `survives_errors`. Raises
    LorakitError for a side file of anything but records.
    """
    if is_stream(output):
        with open_text_output(output) as stream:
            yield stream, []
        return
    with sole_writer(output):
        if not resume:
            delete_siblings(output, "[0-9a-f]{12}[.]part")
        part = OutputLines(output, key, resume=resume, writer=writer)
        if not all(map(_is_object, part.lines)):
            raise _foreign(part.side, writer)
        keep = len(part.lines) - len(part.lines) % multiple
        try:
            with part.writing(keep) as stream:
                yield stream, part.lines[:keep]
        except LorakitError:
            if not survives_errors:
                part.drop()
            raise


@contextlib.contextmanager
def completing(output: str, *delete: Callable[[], None]) -> Iterator[None]:
    """Write an output in the block, then delete what a stopped run would go on from.

    Ctrl-C, SIGTERM and SIGHUP take effect after both, so that no whole output has such a file
    beside it; not where the output is a stream, whose reader may keep the block waiting.
    """
    with contextlib.nullcontext() if is_stream(output) else deferred():
        yield
        for call in delete:
            call()


class SavedValues:
    """JSON values of a run by name, in memory and as the lines of a file.

    Used as a context manager, it deletes the file if the block ends without an error, and leaves it
    for a resumed run otherwise. With `resume` it starts with the values of an earlier run; without,
    it drops them. Without a `path` nothing is saved; of several processes only the one that
    `writes` saves. `find` prefixes names with `key`, so that other runs' values are not used.
    `writer` is the command, for the message about a file that something else wrote. Values outlast
    a killed process at once, a crash of the machine after a second.
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
        self._synced = 0.0  # when, in seconds of time.monotonic
        self.values: dict[str, object] = {}
        if path is not None and resume:
            whole = _whole_lines(path, writer)
            self._size = len(whole.encode())
            self.values = dict(self._parsed(line) for line in whole.split("\n")[:-1])
        elif path is not None and writes and path.exists():
            path.write_bytes(b"")

    def add(self, name: str, value: object) -> None:
        """Add a value and write it to the file at once."""
        self.values[name] = value
        if self._path is None or not self._writes:
            return
        try:
            if self._stream is None:
                self._stream = open(self._path, "ab")  # noqa: SIM115 - open until `close`
                self._stream.truncate(self._size)
            self._stream.write(json.dumps([name, value]).encode() + b"\n")
            self._stream.flush()
            if time.monotonic() > self._synced + 1:
                os.fsync(self._stream.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise cannot_write(self._path, error) from None

    def get(self, name: str, kind: type[T]) -> list[T] | None:
        """Return the list saved under `name`, as `find` would; None if there is none."""
        if f"{self._key}{name}" not in self.values:
            return None
        return self.find(name, kind, list)

    def find(self, name: str, kind: type[T], compute: Callable[[], list[T]]) -> list[T]:
        """Return the list saved under `name`; if there is none, compute and save it.

        Raises LorakitError if the file holds anything but a list of `kind` under that name.
        """
        name = f"{self._key}{name}"
        if name not in self.values:
            self.add(name, compute())
        values = self.values[name]
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise _foreign(self._path, self._writer)
        return values

    def delete(self) -> None:
        """Delete the file, once the run is done."""
        self._close()
        if self._path is not None and self._writes:
            self._path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # a full disk was reported by `add`
                self._stream.close()

    def __len__(self) -> int:
        """Return how many values of this run there are."""
        return sum(name.startswith(self._key) for name in self.values)

    def __enter__(self) -> SavedValues:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
        if error is None:
            self.delete()

    def _parsed(self, line: str) -> tuple[str, object]:
        """Return the name and the value in a line of the file."""
        try:
            name, value = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            raise _foreign(self._path, self._writer) from None
        if not isinstance(name, str):
            raise _foreign(self._path, self._writer)
        return name, value


def _whole_lines(path: Path, writer: str) -> str:
    """Return the text of a side file up to its last line end; "" if there is no file."""
    try:
        content = path.read_bytes() if path.exists() else b""
        return content[: content.rfind(b"\n") + 1].decode()
    except OSError as error:
        raise cannot_write(path, error) from None
    except UnicodeDecodeError:
        raise _foreign(path, writer) from None


def _is_object(line: str) -> bool:
    """Return whether a line is a JSON object, as those of records are."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _foreign(path: Path | None, writer: str) -> LorakitError:
    """Return the error for a file that `writer` did not write."""
    return LorakitError(f"{path} is not what {writer} wrote; run without --resume")


def nothing_saved() -> SavedValues:
    """Return values of a run that neither saves nor resumes."""
    return SavedValues(None, resume=False, writer="")
