"""Read the elements of an XML file one by one, one in memory at a time; safe with untrusted files.

No entities are expanded but the predefined ones and HTML's: a file that declares its own is
refused, and nothing outside the file, be it a DTD or an entity, is opened.
"""

from __future__ import annotations

import codecs
import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorakit.errors import LorakitError
from lorakit.foreign_text import quote
from lorakit.recipes.readers.decoding import codec_of, declared_encoding
from lorakit.recipes.readers.sources import Part

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_CHUNK = 1 << 16
_DEEPEST = 200
_LONGEST = 1 << 24  # characters of one element
_TAG = 64  # characters that a tag within an element counts as: it takes memory too


def elements(
    part: Part, wanted: frozenset[str], ignored: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Element]]:
    """Yield the place and the tree of every outermost element whose local name is wanted.

    Names lose their prefix (`dc:title` is `title`); `ignored` elements are left out of the trees.
    Raises LorakitError naming the line if the file is not XML.
    """
    from xml.parsers import expat

    builder = _Builder(part.name, wanted, ignored)
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler = lambda name, attributes: builder.start(
        name, attributes, parser.CurrentLineNumber
    )
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.text
    parser.DefaultHandlerExpand = builder.other
    parser.EntityDeclHandler = builder.entity
    for data, is_last in _utf8(part):
        try:
            parser.Parse(data, is_last)
        except expat.ExpatError as error:
            reason = expat.errors.messages[error.code]
            raise LorakitError(
                f"{part.name}:{error.lineno}: not XML ({reason}); check that the file is whole"
            ) from error
        for line, element in builder.take_finished():
            yield f"{part.name}:{line}", element


def _utf8(part: Part) -> Iterator[tuple[bytes, bool]]:
    """Yield a file in UTF-8, in chunks, each with whether it is the last.

    expat itself reads no encoding of several bytes but Unicode's. Raises LorakitError for bytes
    that are not in the encoding the file declares, and for one that does not exist.
    """
    data = part.stream.read(_CHUNK)
    encoding = _encoding(data, part.name)
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    while True:
        following = part.stream.read(_CHUNK)
        try:
            text = decoder.decode(data, not following)
        except UnicodeDecodeError as error:
            line += data[: error.start].count(b"\n")
            raise LorakitError(
                f"{part.name}:{line}: not in the encoding {encoding} ({error.reason}); save it as "
                "UTF-8 and declare that"
            ) from error
        yield text.encode(), not following
        if not following:
            return
        line, data = line + text.count("\n"), following


def _encoding(start: bytes, name: str) -> str:
    """Return the encoding of an XML file that begins so: of its byte order mark, or declared."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    end = start.find(b"?>")
    declared = declared_encoding(start[:end]) if start.lstrip().startswith(b"<?xml") else None
    encoding = codec_of(declared) if declared else "utf-8-sig"
    if encoding is None:
        raise LorakitError(
            f"{name}: declares the encoding {quote(str(declared))}, which no document is in; save "
            "it as UTF-8 and declare that"
        )
    return "utf-8-sig" if encoding == "utf-8" else encoding


def text_in(element: Element) -> str:
    """Return the text of an element and everything in it, spaces folded."""
    return " ".join("".join(element.itertext()).split())


class _Builder:
    """Builds the trees of wanted elements and ignores what is around them."""

    def __init__(self, name: str, wanted: frozenset[str], ignored: frozenset[str]) -> None:
        self._name, self._wanted, self._ignored = name, wanted, ignored
        self._open: list[Element] = []
        self._pieces: list[str] = []  # of the text since the last tag
        self._skipping = self._depth = self._size = self._line = 0
        self._finished: list[tuple[int, Element]] = []

    def take_finished(self) -> list[tuple[int, Element]]:
        """Return the line and tree of each element that has ended since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def start(self, name: str, attributes: dict[str, str], line: int) -> None:
        from xml.etree.ElementTree import Element, SubElement

        local = name.rpartition(":")[2]
        self._depth += 1
        if self._depth > _DEEPEST:
            raise LorakitError(f"{self._name}:{line}: elements nested too deeply; check the file")
        if self._skipping or (self._open and local in self._ignored):
            self._skipping += 1
        elif self._open:
            self._grow(_TAG + sum(_TAG + len(k) + len(v) for k, v in attributes.items()))
            self._put_text()
            self._open.append(SubElement(self._open[-1], local, attributes))
        elif local in self._wanted:
            self._open, self._line, self._size = [Element(local, attributes)], line, 0

    def end(self, _: str) -> None:
        self._depth -= 1
        if self._skipping:
            self._skipping -= 1
        elif self._open:
            self._put_text()
            element = self._open.pop()
            if not self._open:
                self._finished.append((self._line, element))

    def text(self, text: str) -> None:
        if self._skipping or not self._open:
            return
        self._grow(len(text))
        self._pieces.append(text)

    def _grow(self, size: int) -> None:
        """Count what the open element takes; LorakitError where it is too much."""
        self._size += size
        if self._size > _LONGEST:
            raise LorakitError(f"{self._name}:{self._line}: an element of more than 16 MiB; cut it")

    def _put_text(self) -> None:
        """Put the text since the last tag into the tree."""
        text, self._pieces = "".join(self._pieces), []
        element = self._open[-1]
        if not text:
            return
        if len(element):
            element[-1].tail = (element[-1].tail or "") + text
        else:
            element.text = (element.text or "") + text

    def other(self, text: str) -> None:
        """Take markup without a handler of its own, of which only HTML's entities are text."""
        if text.startswith("&"):
            self.text(html.unescape(text))

    def entity(self, name: str, *_: object) -> None:
        raise LorakitError(
            f"{self._name}: declares the entity {name!r}, which a bomb could hide in; "
            "write out what it stands for"
        )
