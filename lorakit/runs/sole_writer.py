"""One writer for each output: a second run that would write there ends at once, and says who does.

The lock is a hidden file beside the output, `.NAME.lock`, locked as long as the run lasts. It frees
itself when the run is killed (locks.py), and holds who has it, for the second one's message. On a
file system without locks that record has to do: a holder on this host that no longer lives is
replaced; one on another host is believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.files import (
    cannot_write,
    hidden_path_beside,
    is_stream,
    made_folders,
    names_folder,
)
from lorakit.locks import still_stands, try_lock


class Holder(NamedTuple):
    """The process that writes an output: its number, its host and its command."""

    pid: int
    host: str
    command: str

    @classmethod
    def here(cls) -> Holder:
        """Return this process."""
        words = [os.path.basename(sys.argv[0]), *sys.argv[1:2]]
        return cls(os.getpid(), platform.node(), " ".join(words)[:80])

    @property
    def may_live(self) -> bool:
        """Whether the process runs, or is on another host, where that cannot be told."""
        if self.host != platform.node():
            return True
        if self.pid == os.getpid():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True
        return True

    def words(self) -> str:
        """Return how the message names the process."""
        return f"process {self.pid} on {self.host} ({self.command})"


@contextlib.contextmanager
def sole_writer(output: str, *, writes: bool = True, adapter: bool = False) -> Iterator[None]:
    """Hold the lock of `output` while the block runs; a stream has none.

    The folder of an `adapter` that becomes a folder is made for the lock, with those above it. Of
    several processes of one run, those that do not write pass `writes=False` and hold nothing.
    Raises LorakitError naming the holder where another run writes there.
    """
    if not writes or is_stream(output):
        yield
        return
    path = hidden_path_beside(output, "lock")
    with (
        made_folders(path.parent, output)
        if adapter and names_folder(output)
        else contextlib.nullcontext()
    ):
        descriptor = _hold(path, output)
        try:
            yield
        finally:
            if os.name != "nt":
                path.unlink(missing_ok=True)
            os.close(descriptor)
            if os.name == "nt":
                with contextlib.suppress(OSError):  # the next one may have opened it already
                    path.unlink(missing_ok=True)


def refuse_second_writer(output: str, *, writes: bool = True) -> None:
    """Raise LorakitError, before the work begins, where another run writes `output`."""
    if hidden_path_beside(output, "lock").parent.is_dir():
        with sole_writer(output, writes=writes):
            pass


def _hold(path: Path, output: str) -> int:
    """Return the descriptor of the locked file, which names this process."""
    try:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                if _take(descriptor, path, output):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its holder has just deleted it
    except OSError as error:
        raise cannot_write(output, error) from error


def _take(descriptor: int, path: Path, output: str) -> bool:
    """Lock the open file and write this process into it; return whether it still stands there.

    Where there are locks, a disk without room for the record is left to the output's own writing to
    report. Raises LorakitError where another run holds the file.
    """
    holder = _holder(descriptor)
    locked = try_lock(descriptor)
    if locked is False or (locked is None and holder is not None and holder.may_live):
        raise _held(output, holder, path if locked is None else None)
    if not still_stands(descriptor, path):
        return False
    with contextlib.suppress(OSError) if locked else contextlib.nullcontext():
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(Holder.here()).encode() + b"\n")
    return True


def _holder(descriptor: int) -> Holder | None:
    """Return who the lock file says has it; None where it says nothing that can be read."""
    try:
        pid, host, command = json.loads(os.read(descriptor, 4096))
        return Holder(int(pid), str(host), str(command))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def _held(output: str, holder: Holder | None, path: Path | None) -> LorakitError:
    """Return the error; `path` is the lock file where it has to be deleted by hand."""
    who = "another run" if holder is None else holder.words()
    gone = "" if path is None else f", delete {path} if that process is gone"
    return LorakitError(
        f"{output} is being written by {who}; wait for it{gone}, or choose another -o"
    )
