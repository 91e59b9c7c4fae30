"""Open what a data set is read from: files, folders, archives and stdin, compressed or not.

Everything is streamed. gzip, bzip2, xz and Zstandard are recognised by their first bytes, whatever
the file's name; zip and tar archives are read like folders. This file knows nothing of what is in
the files.
"""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast

from lorakit.errors import LorakitError
from lorakit.files import STDIO, input_name, open_input
from lorakit.recipes.readers.compression import COMPRESSED, decompressed, guarded
from lorakit.recipes.request import Tally

LONGEST_LINE = 1 << 26
_LARGEST_WHOLE = 1 << 26  # bytes of a page, paper or report that is parsed as one


class Part(NamedTuple):
    """One file to read: its name for messages, and its bytes after decompression.

    `path` is the file on disk that holds exactly these bytes, `-` if there is none; `inside` is the
    name within the folder or archive, wherever that lies.
    """

    name: str
    stream: io.BufferedReader
    path: str = STDIO
    inside: str = ""

    @property
    def suffix(self) -> str:
        """The ending of the name in lower case, not counting that of a compression."""
        name = self.name.lower()
        for ending in COMPRESSED:
            name = name.removesuffix(ending)
        return PurePosixPath(name).suffix

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the lines with their numbers; LorakitError at one of more than 64 MiB."""
        for number, line in enumerate(iter(partial(self.stream.readline, LONGEST_LINE), b""), 1):
            if len(line) == LONGEST_LINE:
                raise LorakitError(f"{self.name}:{number}: a line of more than 64 MiB; cut it")
            yield number, line

    def whole(self) -> bytes:
        """Return all bytes; LorakitError if there are more than 64 MiB."""
        content = self.stream.read(_LARGEST_WHOLE + 1)
        if len(content) > _LARGEST_WHOLE:
            raise LorakitError(f"{self.name}: larger than 64 MiB; this is no single document")
        return content


class _Choice(NamedTuple):
    """Which files of a folder or an archive to read: all that match, or the `single` one.

    `purpose` says in error messages what the files are for: " for --split train".
    """

    patterns: Sequence[str]
    single: bool
    purpose: str

    def includes(self, member: str) -> bool:
        """Return whether a member of an archive is to be read."""
        return "__MACOSX" not in member and matches(member, self.patterns)

    def check(self, place: str, names: Sequence[str]) -> None:
        """Raise LorakitError if a place has no such file, or several for a single one."""
        if not names:
            wanted = " or ".join(self.patterns)
            raise LorakitError(f"{place} has no {wanted}{self.purpose}; check the folder")
        if self.single and len(names) > 1:
            raise LorakitError(
                f"{place} has {names[0]} and {names[1]}{self.purpose}; name one of them"
            )


def parts(
    sources: Sequence[str],
    tally: Tally,
    patterns: Sequence[str] = ("*",),
    *,
    single: bool = False,
    purpose: str = "",
) -> Iterator[Part]:
    """Yield the files of the sources (none: stdin), closing each when the next is asked for.

    A file is read whatever its name; of a folder or an archive, the files whose names match one of
    `patterns`, in the order of their paths. `single` requires exactly one. Raises LorakitError if
    there is none; `purpose` says in the message what it is needed for.
    """
    choice = _Choice(patterns, single, purpose)
    for source in sources or (STDIO,):
        if source != STDIO and os.path.isdir(source):
            for path in _paths_in(source, choice):
                inside = Path(path).relative_to(source).as_posix()
                for part in _parts_of(path, tally, choice):
                    yield part._replace(inside=inside)
        else:
            yield from _parts_of(source, tally, choice)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a file's name, with or without a compression's ending, fits a pattern."""
    bare = PurePosixPath(name).name.lower()
    if bare.startswith("."):
        return False
    names = {bare, *(bare.removesuffix(ending) for ending in COMPRESSED)}
    return any(fnmatch(candidate, pattern.lower()) for candidate in names for pattern in patterns)


def _paths_in(folder: str, choice: _Choice) -> list[str]:
    """Return the paths of the chosen files; a single one may lie deeper if none lies on top."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    paths = [str(path) for path in files if matches(path.name, choice.patterns)]
    if choice.single:
        paths = [path for path in paths if Path(path).parent == Path(folder)] or paths
    choice.check(folder, paths)
    return paths


def _parts_of(path: str, tally: Tally, choice: _Choice) -> Iterator[Part]:
    """Yield a file as one part, or the chosen members of an archive."""
    name = input_name(path)
    with contextlib.closing(guarded(open_input(path), name, advance=tally.advance)) as raw:
        stream = decompressed(raw, name)
        head = stream.peek(512)
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            members = _zip_members(stream, path, name, choice)
        elif head[257:262] == b"ustar":
            members = _tar_members(stream, name, choice)
        else:
            plain = path if stream is raw else STDIO
            yield Part(name, stream, plain, os.path.basename(name))
            return
        names: list[str] = []
        for part in members:
            names.append(part.name)
            choice.check(name, names)
            yield part
        choice.check(name, names)


def _zip_members(
    stream: io.BufferedReader, path: str, name: str, choice: _Choice
) -> Iterator[Part]:
    """Yield the chosen members in the order of their names."""
    import zipfile

    errors = (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, NotImplementedError)
    try:
        with seekable(stream, path) as file, zipfile.ZipFile(file) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                if info.is_dir() or not choice.includes(info.filename):
                    continue
                inside = f"{name}/{info.filename}"
                member = guarded(archive.open(info), inside, errors)
                yield Part(inside, decompressed(member, inside), STDIO, info.filename)
    except errors as error:
        raise LorakitError(f"{name}: not a zip archive to read ({error}); unpack it") from error


def _tar_members(stream: BinaryIO, name: str, choice: _Choice) -> Iterator[Part]:
    """Yield the chosen members in the order of the archive, which can be a pipe."""
    import tarfile

    errors = (tarfile.TarError, EOFError)
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for info in archive:
                content = archive.extractfile(info) if info.isfile() else None
                if content is None or not choice.includes(info.name):
                    continue
                inside = f"{name}/{info.name}"
                member = guarded(content, inside, errors)
                yield Part(inside, decompressed(member, inside), STDIO, info.name)
    except errors as error:
        raise LorakitError(f"{name}: damaged or cut short ({error}); fetch it again") from error


@contextlib.contextmanager
def seekable(stream: BinaryIO, path: str) -> Iterator[BinaryIO]:
    """Yield a file that can be read in any order: the one at `path`, else a copy on disk."""
    if path != STDIO and os.path.isfile(path):
        with open_input(path) as file:
            yield file
        return
    import shutil
    import tempfile

    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        yield cast(BinaryIO, copy)
