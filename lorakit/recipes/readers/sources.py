"""Opening what a data set is read from: files, folders, archives and stdin, compressed or not.

Everything is streamed. gzip, bzip2, xz and Zstandard are known by their first bytes, whatever the
name; zip and tar archives are read like folders. It knows nothing of what is in the files.
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
from lorakit.files import STDIO, open_input
from lorakit.recipes.readers.compression import COMPRESSED, decompressed, guarded
from lorakit.recipes.request import Tally

LONGEST_LINE = 1 << 26
_LARGEST_WHOLE = 1 << 26  # bytes of a page, paper or report that is parsed as one


class Part(NamedTuple):
    """One file to read: its name for messages, and its bytes after decompression.

    `path` is where these bytes lie on the disk, `-` where they do not lie there as they are;
    `inside` is the name within the folder or archive, the same wherever that lies.
    """

    name: str
    stream: io.BufferedReader
    path: str = STDIO
    inside: str = ""

    @property
    def suffix(self) -> str:
        """The name's ending in lower case, without that of a compression."""
        name = self.name.lower()
        for ending in COMPRESSED:
            name = name.removesuffix(ending)
        return PurePosixPath(name).suffix

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the lines with their numbers; LorakitError at one that no text can have."""
        for number, line in enumerate(iter(partial(self.stream.readline, LONGEST_LINE), b""), 1):
            if len(line) == LONGEST_LINE:
                raise LorakitError(f"{self.name}:{number}: a line of more than 64 MiB; cut it")
            yield number, line

    def whole(self) -> bytes:
        """Return all bytes; LorakitError where there are more than a document can have."""
        content = self.stream.read(_LARGEST_WHOLE + 1)
        if len(content) > _LARGEST_WHOLE:
            raise LorakitError(f"{self.name}: larger than 64 MiB; this is no single document")
        return content


def parts(
    sources: Sequence[str],
    tally: Tally,
    patterns: Sequence[str] = ("*",),
    *,
    one: bool = False,
    wanted: str = "",
) -> Iterator[Part]:
    """Yield the files of the sources (none: stdin), each closed when the next is asked for.

    A file is read whatever its name; of a folder or an archive, the files whose names match one of
    `patterns`, in the order of their paths. `one`: there has to be exactly one. Raises LorakitError
    where there is none, naming what was `wanted`.
    """
    for source in sources or (STDIO,):
        if source != STDIO and os.path.isdir(source):
            for path in _files_in(source, patterns, one, wanted):
                inside = Path(path).relative_to(source).as_posix()
                for part in _file(path, tally, patterns, one, wanted):
                    yield part._replace(inside=inside)
        else:
            yield from _file(source, tally, patterns, one, wanted)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a file's name, with or without a compression's ending, fits a pattern."""
    bare = PurePosixPath(name).name.lower()
    if bare.startswith("."):
        return False
    names = {bare, *(bare.removesuffix(ending) for ending in COMPRESSED)}
    return any(fnmatch(each, pattern.lower()) for each in names for pattern in patterns)


def _files_in(folder: str, patterns: Sequence[str], one: bool, wanted: str) -> list[str]:
    listed = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    found = [str(path) for path in listed if matches(path.name, patterns)]
    if one:
        found = [path for path in found if Path(path).parent == Path(folder)] or found
    _check_count(folder, found, patterns, one, wanted)
    return found


def _check_count(
    place: str, found: Sequence[str], patterns: Sequence[str], one: bool, wanted: str
) -> None:
    if not found:
        raise LorakitError(f"{place} has no {' or '.join(patterns)}{wanted}; check the folder")
    if one and len(found) > 1:
        raise LorakitError(f"{place} has {found[0]} and {found[1]}{wanted}; name one of them")


def _file(
    path: str, tally: Tally, patterns: Sequence[str], one: bool, wanted: str
) -> Iterator[Part]:
    name = "stdin" if path == STDIO else path
    stream = guarded(open_input(path), name, advance=tally.advance)
    with contextlib.closing(stream) as opened:
        stream = decompressed(opened, name)
        head = stream.peek(512)
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            members = _zip_members(stream, path, name, patterns)
        elif head[257:262] == b"ustar":
            members = _tar_members(stream, name, patterns)
        else:
            plain = path if stream is opened else STDIO
            yield Part(name, stream, plain, os.path.basename(name))
            return
        seen: list[str] = []
        for part in members:
            seen.append(part.name)
            _check_count(name, seen, patterns, one, wanted)
            yield part
        _check_count(name, seen, patterns, one, wanted)


def _zip_members(
    stream: io.BufferedReader, path: str, name: str, patterns: Sequence[str]
) -> Iterator[Part]:
    import zipfile

    errors = (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, NotImplementedError)
    try:
        with seekable(stream, path) as file, zipfile.ZipFile(file) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                if info.is_dir() or not _kept(info.filename, patterns):
                    continue
                inside = f"{name}/{info.filename}"
                member = guarded(archive.open(info), inside, errors)
                yield Part(inside, decompressed(member, inside), STDIO, info.filename)
    except errors as error:
        raise LorakitError(f"{name}: not a zip archive to read ({error}); unpack it") from error


def _tar_members(stream: BinaryIO, name: str, patterns: Sequence[str]) -> Iterator[Part]:
    import tarfile

    errors = (tarfile.TarError, EOFError)
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for info in archive:
                content = archive.extractfile(info) if info.isfile() else None
                if content is None or not _kept(info.name, patterns):
                    continue
                inside = f"{name}/{info.name}"
                member = guarded(content, inside, errors)
                yield Part(inside, decompressed(member, inside), STDIO, info.name)
    except errors as error:
        raise LorakitError(f"{name}: damaged or cut short ({error}); fetch it again") from error


def _kept(member: str, patterns: Sequence[str]) -> bool:
    return "__MACOSX" not in member and matches(member, patterns)


@contextlib.contextmanager
def seekable(stream: BinaryIO, path: str) -> Iterator[BinaryIO]:
    """Yield a file that can be read from anywhere: the one at `path`, else a copy on disk."""
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
