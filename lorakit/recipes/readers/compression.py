"""Compressed streams, known by their first bytes; what is damaged in them names the file."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import IO, Any, BinaryIO, cast

from lorakit.errors import LorakitError, missing_package
from lorakit.files import explain

_BUFFER = 1 << 18
_ZST_FED = 1 << 10
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class _Guarded(io.RawIOBase):
    """A stream whose errors name the file and whose bytes are counted."""

    def __init__(
        self,
        inner: IO[bytes],
        name: str,
        errors: tuple[type[Exception], ...] = (),
        advance: Callable[[int], object] | None = None,
    ) -> None:
        self._inner, self._name, self._errors = inner, name, errors
        self._advance = advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        try:
            data: bytes = self._inner.read1(len(view))  # type: ignore[attr-defined]
        except self._errors as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LorakitError(
                f"{self._name}: damaged or cut short ({reason}); fetch it again"
            ) from error
        except OSError as error:
            raise LorakitError(
                f"cannot read {self._name}: {explain(error)}; check the path"
            ) from error
        view[: len(data)] = data
        if self._advance is not None:
            self._advance(len(data))
        return len(data)

    def close(self) -> None:
        self._inner.close()
        super().close()


def guarded(
    inner: IO[bytes],
    name: str,
    errors: tuple[type[Exception], ...] = (),
    advance: Callable[[int], object] | None = None,
) -> io.BufferedReader:
    """Return a stream whose `errors` become a LorakitError and whose bytes go to `advance`."""
    return io.BufferedReader(_Guarded(inner, name, errors, advance), _BUFFER)


def decompressed(stream: io.BufferedReader, name: str) -> io.BufferedReader:
    """Return the stream of what a compressed stream holds; one that is not is returned itself."""
    head = stream.peek(8)
    for magic, opened in _MAGIC.items():
        if head.startswith(magic):
            return opened(stream, name)
    return stream


def _gunzip(stream: BinaryIO, name: str) -> io.BufferedReader:
    import gzip

    errors = (gzip.BadGzipFile, EOFError, zlib.error)
    return guarded(cast(IO[bytes], gzip.GzipFile(fileobj=stream)), name, errors)


def _bunzip(stream: BinaryIO, name: str) -> io.BufferedReader:
    import bz2

    return guarded(cast(IO[bytes], bz2.BZ2File(stream)), name, (OSError, EOFError, ValueError))


def _unxz(stream: BinaryIO, name: str) -> io.BufferedReader:
    import lzma

    return guarded(cast(IO[bytes], lzma.LZMAFile(stream)), name, (lzma.LZMAError, EOFError))


def _unzst(stream: BinaryIO, name: str) -> io.BufferedReader:
    try:
        import zstandard
    except ImportError:
        what = f"{name} is compressed by Zstandard: it"
        raise missing_package(what, "zstandard", "zst") from None
    opened = _Frames(stream, lambda: zstandard.ZstdDecompressor().decompressobj())
    return guarded(cast(IO[bytes], opened), name, (zstandard.ZstdError, EOFError))


class _Frames:
    """Zstandard's frames one after the other; unlike its own reader it knows a file cut short.

    It feeds few bytes at a time, since each may stand for many times as many.
    """

    def __init__(self, stream: BinaryIO, new: Callable[[], Any]) -> None:
        self._stream, self._new = stream, new
        self._frame: Any = None
        self._rest = self._made = b""
        self._place = 0

    def read1(self, size: int) -> bytes:
        while self._place >= len(self._made):
            data = self._rest or self._stream.read(_ZST_FED)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame does not end")
                return b""
            self._frame = self._frame or self._new()
            self._made, self._rest, self._place = self._frame.decompress(data), b"", 0
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        self._place += size
        return bytes(self._made[self._place - size : self._place])

    def close(self) -> None:
        self._stream.close()


_MAGIC: dict[bytes, Callable[[BinaryIO, str], io.BufferedReader]] = {
    b"\x1f\x8b": _gunzip,
    b"BZh": _bunzip,
    b"\xfd7zXZ\x00": _unxz,
    b"\x28\xb5\x2f\xfd": _unzst,
}
