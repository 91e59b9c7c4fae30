"""Decompress streams, recognised by their first bytes; errors name the damaged file."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, BinaryIO, cast

from lorakit.errors import LorakitError, missing_package
from lorakit.files import explain

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj

_BUFFER = 1 << 18
_ZST_INPUT = 1 << 10
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
    """Return a stream that turns `errors` into LorakitErrors and reports its bytes to `advance`."""
    return io.BufferedReader(_Guarded(inner, name, errors, advance), _BUFFER)


def decompressed(stream: io.BufferedReader, name: str) -> io.BufferedReader:
    """Return a stream of the decompressed bytes, or the stream itself if it is not compressed."""
    head = stream.peek(8)
    for magic, decompress in _MAGIC.items():
        if head.startswith(magic):
            return decompress(stream, name)
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
        raise missing_package(
            f"{name} is compressed by Zstandard: it", "zstandard", "zst"
        ) from None
    frames = _ZstdFrames(stream, lambda: zstandard.ZstdDecompressor().decompressobj())
    return guarded(cast(IO[bytes], frames), name, (zstandard.ZstdError, EOFError))


class _ZstdFrames:
    """Decompresses Zstandard frames one after the other; a missing end is an EOFError.

    Zstandard's own reader accepts a truncated file as complete. The input is fed in small pieces,
    since a few bytes may expand to very many.
    """

    def __init__(self, stream: BinaryIO, new_frame: Callable[[], ZstdDecompressionObj]) -> None:
        self._stream, self._new_frame = stream, new_frame
        self._frame: ZstdDecompressionObj | None = None
        self._input = self._output = b""
        self._position = 0

    def read1(self, size: int) -> bytes:
        while self._position >= len(self._output):
            data = self._input or self._stream.read(_ZST_INPUT)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last frame does not end")
                return b""
            frame = self._frame = self._frame or self._new_frame()
            self._output, self._input, self._position = frame.decompress(data), b"", 0
            if frame.eof:
                self._input, self._frame = frame.unused_data, None
        self._position += size
        return self._output[self._position - size : self._position]

    def close(self) -> None:
        self._stream.close()


_MAGIC: dict[bytes, Callable[[BinaryIO, str], io.BufferedReader]] = {
    b"\x1f\x8b": _gunzip,
    b"BZh": _bunzip,
    b"\xfd7zXZ\x00": _unxz,
    b"\x28\xb5\x2f\xfd": _unzst,
}
