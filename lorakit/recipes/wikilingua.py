"""WikiLingua: how-to guides and the headings of their steps (Ladhak et al., 2020).

The original files are pickles. A pickle can name any Python function and have it called, so the
unpickler here resolves no names at all: what remains is lists, dicts and texts. It is Python's own
in Python, since the one in C takes memory for whatever a pickle claims to hold.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from lorakit.errors import LorakitError
from lorakit.recipes.readers.rows import (
    converted,
    id_of,
    objects_in,
    split_names,
    split_parts,
    stripped,
)
from lorakit.recipes.readers.sources import Part
from lorakit.recipes.request import Request, Tally, UnwantedError
from lorakit.records.record import Record

_NAMES = split_names("*{}*.jsonl", "*{}*.json")
_PICKLES = ("*.pkl", "*.pickle")
_MOST_OPERATIONS = 8_000_000  # of a pickle; a section of a guide takes about 14
_LONGEST_TEXT = 1 << 24  # bytes
_LARGEST_METHOD = 1 << 24  # characters of its texts: one text can stand in it many times
_OTHER_LANGUAGE = "a guide in another language than --lang"
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)


def wikilingua_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield a row for every method of a guide: its steps' texts, and their headings joined.

    A source is a file of lines in the GEM form, one of the original pickles, or the folder with the
    split's file; a pickle has no splits and is read whole. --lang keeps the GEM rows that are in
    this language on both sides. A line:

        {"gem_id": "wikilingua_multilingual-train-11", "source_language": "en",
         "target_language": "en", "source": "Use a sharp knife. Cut away from yourself.",
         "target": "Cut the stem.", "references": ["Cut the stem."]}
    """
    names = {split: (*patterns, *_PICKLES) for split, patterns in _NAMES.items()}
    for part in split_parts(sources, request, tally, names):
        if part.suffix in (".pkl", ".pickle") or part.stream.peek(1)[:1] == b"\x80":
            yield from converted(_pickled(part), _method, tally)
            continue
        for row in objects_in(part, tally):
            if isinstance(row.fields.get("article"), dict):
                yield from converted(_sections(row), _method, tally)
            else:
                yield from converted([row], lambda row: _gem(row, request.lang), tally)


def _gem(row: Record, lang: str | None) -> Record:
    """Return the row of a line in the GEM form; UnwantedError if it is in another language."""
    languages = (row.fields.get("source_language"), row.fields.get("target_language"))
    if lang is not None and any(language not in (None, lang) for language in languages):
        raise UnwantedError(_OTHER_LANGUAGE)
    targets = row.fields.get("references") or [row.fields.get("target")]
    if not isinstance(targets, list):
        raise LorakitError(f"{row.where}: 'references' is not a list; check the file")
    references = [_joined(text, f"{row.where}: the target") for text in targets]
    several = {"references": references} if len(references) > 1 else {}
    article = _joined(row.fields.get("source"), f"{row.where}: 'source'")
    fields = {"id": id_of(row, "gem_id", "id"), "article": article, "summary": references[0]}
    return Record({**fields, **several}, row.where)


def _joined(value: object, what: str) -> str:
    """Return a text, or a list of texts (steps or their headings) joined by spaces."""
    if isinstance(value, list | tuple):
        if sum(len(text) for text in value if isinstance(text, str)) > _LARGEST_METHOD:
            raise LorakitError(f"{what} is of more than 16 Mi characters; cut it")
        return " ".join(stripped(text, what) for text in value)
    return " ".join(stripped(value, what).split())


def _sections(row: Record) -> Iterator[Record]:
    """Yield the methods of a guide whose fields are lists of one length, as the hub has it."""
    article, url = row.fields["article"], row.fields.get("url", id_of(row))
    columns = [article.get(name) for name in ("section_name", "document", "summary")]
    if not all(isinstance(column, list) for column in columns) or len({*map(len, columns)}) != 1:
        raise LorakitError(f"{row.where}: 'article' is not three lists of one length; check it")
    for name, document, summary in zip(*columns, strict=True):
        fields = {"id": f"{url}#{name}", "document": document, "summary": summary}
        yield Record(fields, row.where)


def _method(row: Record) -> Record:
    """Return the row of one method, whose id is its guide's address and its heading."""
    fields = {
        "id": row.id,
        "article": _joined(row.fields.get("document"), f"{row.where}: 'document'"),
        "summary": _joined(row.fields.get("summary"), f"{row.where}: 'summary'"),
    }
    return Record(fields, row.where)


class _Bounded(io.RawIOBase):
    """A pickle's bytes, of which no more than a text's are read at once."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        if size > _LONGEST_TEXT:
            raise pickle.UnpicklingError("it claims a text of more than 16 MiB")
        return self._stream.read(size)

    def readline(self, size: int | None = -1) -> bytes:
        return self._stream.readline(_LONGEST_TEXT)


def _counted(operation: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return an operation of the unpickler's that counts itself."""

    def count(self: _PlainUnpickler) -> None:
        self.operations += 1
        if self.operations > _MOST_OPERATIONS:
            raise pickle.UnpicklingError(f"it has more than {_MOST_OPERATIONS} operations")
        operation(self)

    return count


class _PlainUnpickler(pickle._Unpickler):
    """Reads lists, dicts, texts and numbers, and refuses all imports that a pickle asks for."""

    dispatch = {code: _counted(run) for code, run in pickle._Unpickler.dispatch.items()}  # noqa: RUF012
    operations = 0

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _pickled(part: Part) -> Iterator[Record]:
    """Yield the methods in one of the original pickles."""
    try:
        guides = _PlainUnpickler(_Bounded(part.stream), encoding="utf-8").load()
    except _UNPICKLING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LorakitError(
            f"{part.name}: not a pickle of plain dicts and texts ({reason}); "
            "give WikiLingua's own file or the GEM form"
        ) from error
    yield from _methods(guides, part.name)


def _methods(guides: object, name: str) -> Iterator[Record]:
    """Yield the methods of guides: {url: {section: {"document": …, "summary": …}}}."""
    for url, sections in _items(guides, name):
        for section, fields in _items(sections, f"{name}: {url}"):
            where = f"{name}: {url}#{section}"
            texts = dict(_items(fields, where))
            method = {key: texts.get(key) for key in ("document", "summary")}
            yield Record({"id": f"{url}#{section}", **method}, where)


def _items(value: object, where: str) -> list[tuple[str, object]]:
    """Return the items of a dict with texts as keys; LorakitError if it is not such a dict."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise LorakitError(f"{where}: not a dict by texts; give WikiLingua's own pickle")
    return list(value.items())
