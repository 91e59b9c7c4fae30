"""Open what a command reads and writes: `-` for stdin and stdout, files replaced atomically.

What is in the files is the business of records/jsonl.py and adapters/storage.py.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from lorakit.errors import LorakitError
from lorakit.locks import still_stands, try_lock

STDIO = "-"


def explain(error: OSError) -> str:
    """Return the reason of an operating-system error in lower case, without its number."""
    return (error.strerror or str(error)).lower()


def input_name(path: str) -> str:
    """Return how messages name an input: by its path, or as stdin."""
    return "stdin" if path == STDIO else path


def open_input(path: str) -> BinaryIO:
    """Open `path` for reading bytes; `-` is stdin. Raises LorakitError if it cannot be read."""
    if path == STDIO:
        return sys.stdin.buffer
    try:
        return open(path, "rb")
    except OSError as error:
        raise LorakitError(f"cannot read {path}: {explain(error)}; check the path") from error


@contextlib.contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """Yield `path` opened by open_input; an error while reading is raised as LorakitError too."""
    try:
        with open_input(path) as stream:
            yield stream
    except OSError as error:
        raise LorakitError(
            f"cannot read {input_name(path)}: {explain(error)}; check the path"
        ) from error


def is_stream(path: str) -> bool:
    """Return whether `path` is `-`, a device or a named pipe, which is written to, not replaced."""
    target = Path(path)
    return path == STDIO or (target.exists() and not target.is_file() and not target.is_dir())


def check_output(path: str) -> None:
    """Raise LorakitError, before the work begins, if no file could be written at `path`."""
    if not is_stream(path):
        with _side_file(path):
            pass


def refuse_terminal(what: str) -> None:
    """Raise LorakitError if stdout is a terminal, which binary data would garble."""
    if sys.stdout.isatty():
        raise LorakitError(f"{what} would go to the terminal; give -o FILE or pipe it on")


def names_folder(output: str) -> bool:
    """Return whether an adapter's `output` is a folder: its name ends in a slash, has no suffix, or
    is that of a folder; `-`, devices and named pipes are none."""
    if output.endswith(("/", os.sep)) or os.path.isdir(output):
        return True
    return not is_stream(output) and not Path(output).suffix


def check_adapter_output(output: str) -> None:
    """Raise LorakitError, before the work begins, if an adapter could not be written to `output`.

    A folder is made, with those above it, when it is written.
    """
    if output == STDIO:
        refuse_terminal("an adapter")
    elif not names_folder(output):
        check_output(output)
    else:
        _check_folder(Path(output))


def _check_folder(folder: Path) -> None:
    """Raise LorakitError where a file stands in the place of a folder, or it cannot be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        reason = os.strerror(errno.ENOTDIR)
        if there == folder:
            reason = "it is a file, and a name without a suffix is a folder's"
        raise LorakitError(f"cannot write {folder}: {reason.lower()}; choose another -o")
    if not os.access(there, os.W_OK | os.X_OK):
        raise cannot_write(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a side file that is synced and renamed to `path` if the block ends without an error.

    Until then the old file stays as it was, so a half-written file never has the final name. Links
    are followed: what `path` points to is replaced. An existing file keeps its permissions.
    """
    final = Path(os.path.realpath(path))
    with _side_file(path) as side:
        try:
            os.chmod(side, mode_of(final))
            yield side
            sync(side)
            os.replace(side, final)
            sync(final.parent)
        except OSError as error:
            raise cannot_write(path, error) from error


@contextlib.contextmanager
def _side_file(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary file in the folder of what `path` is, or links to; then delete it.

    It is locked meanwhile, so that those that a killed run left can be told, and are deleted here.
    """
    import tempfile

    final = Path(os.path.realpath(path))
    try:
        refuse_directory(final)
        _delete_abandoned(final)
        while True:
            prefix = f".{final.name}."
            descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=final.parent)
            if os.name == "nt":  # which renames no file that is open
                os.close(descriptor)
                break
            if try_lock(descriptor) is not False and still_stands(descriptor, name):
                break
            os.close(descriptor)  # taken for abandoned before it was locked
    except OSError as error:
        raise cannot_write(path, error) from error
    side = Path(name)
    try:
        yield side
    finally:
        side.unlink(missing_ok=True)
        if os.name != "nt":
            os.close(descriptor)


def _delete_abandoned(final: Path) -> None:
    """Delete the temporary files of `final` whose writers have ended."""
    if os.name == "nt":
        return
    for path in _siblings(final, "[a-z0-9_]{8}[.]part"):
        with contextlib.suppress(OSError):  # another's, or gone by now
            descriptor = os.open(path, os.O_RDWR)
            try:
                if try_lock(descriptor):
                    path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def delete_siblings(output: str, pattern: str) -> None:
    """Delete the hidden files beside `output`, named after it, whose suffixes match a pattern."""
    for path in _siblings(Path(os.path.realpath(output)), pattern):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _siblings(final: Path, pattern: str) -> list[Path]:
    """Return the paths `.NAME.SUFFIX` beside a file whose suffixes match a pattern."""
    matches = re.compile(rf"{re.escape(f'.{final.name}.')}({pattern})").fullmatch
    with os.scandir(final.parent) as entries:
        return [Path(entry.path) for entry in entries if matches(entry.name)]


def hidden_path_beside(output: str, suffix: str) -> Path:
    """Return the path of a hidden file beside the file that `output` is or links to."""
    final = Path(os.path.realpath(output))
    return final.with_name(f".{final.name}.{suffix}")


@contextlib.contextmanager
def made_folders(folder: Path, output: str | Path) -> Iterator[None]:
    """Make a folder, with those above it, for the block; those that stay empty go with an error.

    Raises LorakitError naming `output` where that is not possible.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(output, error) from error
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        raise


def refuse_directory(path: Path) -> None:
    """Raise IsADirectoryError if `path` is a folder."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def cannot_write(path: str | Path, error: OSError) -> LorakitError:
    """Return the LorakitError for an output that cannot be written."""
    name = "stdout" if path == STDIO else path
    return LorakitError(f"cannot write {name}: {explain(error)}; choose another -o")


def check_space(folder: Path, needed: int, output: str | Path) -> None:
    """Raise LorakitError where the disk of a folder has less room than `needed` bytes."""
    import shutil

    free = shutil.disk_usage(folder).free
    if needed > free:
        raise LorakitError(
            f"{output} needs {size(needed)}, and {size(free)} are free; make room, or choose "
            "another -o"
        )


def size(count: int) -> str:
    """Return a number of bytes in the largest unit of which there is one at least."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((p for p in range(len(units)) if count < 1024 ** (p + 1)), len(units) - 1)
    return f"{count} B" if power == 0 else f"{count / 1024**power:.2f} {units[power]}"


def mode_of(path: Path) -> int:
    """Return the permissions of an existing file, or those that a new file would get."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_text_output(path: str) -> Iterator[IO[str]]:
    """Yield a UTF-8 text stream to `path`, put in place when the block ends; `-` is stdout.

    Devices and named pipes are written to directly. A closed pipe raises BrokenPipeError.
    """
    if not is_stream(path):
        with atomic_path(path) as side, open(side, "w", encoding="utf-8", newline="\n") as stream:
            yield stream
        return
    try:
        if path != STDIO:
            with open(path, "w", encoding="utf-8", newline="\n") as stream:
                yield stream
            return
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="strict", newline="\n")
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error
