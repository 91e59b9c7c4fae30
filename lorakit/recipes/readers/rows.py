"""Read the raw rows of JSON files and lines of text, each with its place in the file.

A row is a Record whose fields are the source's own; recipes name them, templates use them. This
file knows no data set.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from lorakit.errors import LorakitError
from lorakit.recipes.readers.sources import Part, parts
from lorakit.recipes.request import SPLITS, Request, Tally, UnwantedError, split_aliases
from lorakit.records.jsonl import parse_json, parse_object
from lorakit.records.record import Record

_CHUNK = 1 << 20
_LONGEST_VALUE = 1 << 26


def converted(
    rows: Iterable[Record], convert: Callable[[Record], Record], tally: Tally
) -> Iterator[Record]:
    """Yield the converted rows; those that are malformed or unwanted go to the tally."""
    for row in rows:
        try:
            result = convert(row)
        except LorakitError as error:
            tally.reject(error)
        except UnwantedError as reason:
            tally.remove(str(reason))
        else:
            yield result


def until_damage(rows: Iterable[Record], tally: Tally) -> Iterator[Record]:
    """Yield the rows of a file up to where it is damaged; the tally counts the rest as one row."""
    try:
        yield from rows
    except LorakitError as error:
        tally.reject(error)


def split_parts(
    sources: Sequence[str], request: Request, tally: Tally, names: Mapping[str, Sequence[str]]
) -> Iterator[Part]:
    """Yield the files to read: from folders and archives, the one file of the split.

    `names` has the patterns of each split's file; a data set may lack a split.
    """
    patterns, purpose = names.get(request.split), f" for --split {request.split}"
    if patterns is None:  # then only files named as SOURCE can be read
        patterns, purpose = (f"{request.split} set",), f", only {' and '.join(names)}"
    yield from parts(sources, tally, patterns, single=True, purpose=purpose)


def split_names(*forms: str) -> dict[str, tuple[str, ...]]:
    """Return the file names of every split: each form with the split's names in place of {}."""
    return {
        split: tuple(form.format(name) for form in forms for name in split_aliases(split))
        for split in SPLITS
    }


# — fields —


def text_of(row: Record, name: str) -> str:
    """Return the stripped text of a field.

    Raises LorakitError if the field is missing or not a text, UnwantedError if it is empty.
    """
    value = row.fields.get(name)
    if value is not None:
        return stripped(value, f"{row.where}: {name!r}")
    raise LorakitError(f"{row.where}: no field {name!r}; check that this is the recipe's data set")


def stripped(value: object, what: str) -> str:
    """Return a text without the space around it.

    Raises LorakitError naming `what` if the value is not a text, UnwantedError if it is empty.
    """
    if not isinstance(value, str):
        raise LorakitError(f"{what} is not a text; check that this is the recipe's data set")
    if not value.strip():
        raise UnwantedError("an empty text where the data set has one")
    return value.strip()


def id_of(row: Record, *names: str) -> str:
    """Return the first of these fields that is set, else the file's name and the row's number.

    The name has no folder, so that the id does not depend on where the file lies.
    """
    for name in names:
        if row.fields.get(name) not in (None, ""):
            return str(row.fields[name])
    return os.path.basename(row.where).replace(": record ", ":")


def rest_of(row: Record, *used: str) -> dict[str, object]:
    """Return the fields that a recipe does not use but passes through."""
    return {name: value for name, value in row.fields.items() if name not in used}


# — JSON —


def json_rows(sources: Sequence[str], _: Request, tally: Tally) -> Iterator[Record]:
    """Yield the objects of JSONL files, or of files that hold one JSON array (no source: stdin).

    A line:

        {"id": "n1", "prompt": "Summarize: A long, long text.", "completion": " Short."}
    """
    for part in parts(sources, tally, ("*.jsonl", "*.json", "*.ndjson")):
        yield from objects_in(part, tally)


def objects_in(part: Part, tally: Tally) -> Iterator[Record]:
    """Yield the objects of one file: of its lines or, if it begins with `[`, of the array."""
    if first_character(part) == b"[":
        yield from _array(part, tally)
        return
    for number, line in part.lines():
        if line.strip():
            where = f"{part.name}:{number}"
            try:
                fields = parse_object(line, where)
            except LorakitError as error:
                tally.reject(error)
            else:
                yield Record(fields, where)


def first_character(part: Part) -> bytes:
    """Return the first byte of a text file that is neither space nor a byte-order mark."""
    return part.stream.peek(512)[:512].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]


def _array(part: Part, tally: Tally) -> Iterator[Record]:
    """Yield the objects of a file that holds one JSON array."""
    text = _JsonText(part)
    text.take("[")
    number = 0
    while text.next_character() != "]":
        number += 1
        where = f"{part.name}: record {number}"
        value = text.value(where)
        if isinstance(value, dict):
            yield Record(value, where)
        else:
            tally.reject(LorakitError(f"{where}: not a JSON object; each must be one record"))
        if text.next_character() != "]":
            text.take(",")
    text.take("]")
    if text.next_character():
        raise LorakitError(f"{part.name}: text after the array's end; give one JSON array a file")


class _JsonText:
    """Decodes a JSON text value by value, keeping no more of it in memory than a value needs."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._position, self._ended = "", 0, False

    def _read_more(self, size: int = _CHUNK) -> None:
        """Decode further bytes and drop the text that has been taken."""
        data = self._part.stream.read(size)
        try:
            new = self._decoder.decode(data, not data)
        except UnicodeDecodeError:
            raise LorakitError(f"{self._part.name}: not UTF-8 text; save it as UTF-8") from None
        self._text, self._position = self._text[self._position :] + new, 0
        self._ended = not data

    def next_character(self) -> str:
        """Return the next character that is not a space, without taking it; empty at the end."""
        while True:
            text = self._text
            while self._position < len(text) and text[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(text) or self._ended:
                return text[self._position : self._position + 1]
            self._read_more()

    def take(self, character: str) -> None:
        """Take the next character; LorakitError if it is not this one."""
        actual = self.next_character()
        if actual != character:
            what = f"{actual!r}" if actual else "the end of the file"
            raise LorakitError(
                f"{self._part.name}: {what} where the JSON array needs {character!r}; "
                "check that the file is whole"
            )
        self._position += 1

    def value(self, where: str) -> object:
        """Return the next value; LorakitError if it is not JSON."""
        self.next_character()
        size = _CHUNK
        while True:
            value, end, reason = parse_json(self._text, self._position)
            if not reason and (end < len(self._text) or self._ended):
                self._position = end
                return value
            if self._ended or len(self._text) - self._position > _LONGEST_VALUE:
                raise LorakitError(f"{where}: {reason}; check that the file is whole")
            self._read_more(size)
            size *= 2


# — lines —


def lines_in(part: Part, tally: Tally) -> Iterator[tuple[str, str | None]]:
    """Yield the place and the text of every line; None for a line that is not UTF-8.

    The tally counts such a line as malformed.
    """
    for number, line in part.lines():
        where = f"{part.name}:{number}"
        try:
            yield where, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            tally.reject(LorakitError(f"{where}: not UTF-8 text; save the file as UTF-8"))
            yield where, None
