"""The program, run in this process: quick, and an error that it does not answer is a failed test.

A subprocess costs a second or more for its imports alone, too much for thousands of runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pytest

from lorakit.cli import main


class Ended(NamedTuple):
    """How a run ended: its exit status, the bytes on stdout, the text on stderr."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        """What it wrote to stdout."""
        return self.stdout.decode("utf-8")

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that report an error."""
        return [line for line in self.stderr.splitlines() if line.startswith("Error: ")]


def run_here(
    *arguments: str, stdin: bytes = b"", reader_gone: bool = False, cwd: Path | None = None
) -> Ended:
    """Run `lorakit` with these arguments; what it raises beside SystemExit is raised here.

    With `reader_gone`, stdout is a pipe that nobody reads.
    """
    err = io.StringIO()
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        out: BinaryIO = stack.enter_context(_unread_pipe()) if reader_gone else io.BytesIO()
        patch.setattr(sys, "argv", ["lorakit", *arguments])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8"))
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as stop:
            main()
        sys.stdout.flush()
        written = out.getvalue() if isinstance(out, io.BytesIO) else b""
        return Ended(int(stop.value.code or 0), written, err.getvalue())


def _unread_pipe() -> BinaryIO:
    """Return a pipe to write to whose other end is closed."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "wb")


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file grow above `size` bytes inside the block; writing more raises OSError."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
