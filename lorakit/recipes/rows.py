"""Raw rows of line-wise files, each with the place it was read from.

A row is a Record whose fields are the source's own; the recipes name them, the templates use them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorakit.errors import LorakitError
from lorakit.files import STDIO, reading
from lorakit.records import Record, read_objects

SPLITS = ("train", "validation", "test")
_CSV_FIELD_LIMIT = 1 << 30


def json_rows(sources: Sequence[str]) -> Iterator[Record]:
    """Yield the objects of JSONL files (none given: stdin)."""
    for source in sources or (STDIO,):
        yield from read_objects(source)


def csv_rows(sources: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of CSV files with a header line (`.tsv`: tab-separated; none given: stdin).

    Quoted fields may hold line breaks; a byte-order mark is dropped. Raises LorakitError naming
    file and line for a row that is longer or shorter than the header.
    """
    for source in sources or (STDIO,):
        name = "stdin" if source == STDIO else source
        delimiter = "\t" if source.lower().endswith(".tsv") else ","
        with reading(source) as stream:
            text = io.TextIOWrapper(
                stream, encoding="utf-8-sig", errors="surrogateescape", newline=""
            )
            try:
                yield from _table(text, name, delimiter)
            finally:
                text.detach()


def _table(text: io.TextIOWrapper, name: str, delimiter: str) -> Iterator[Record]:
    import csv

    csv.field_size_limit(_CSV_FIELD_LIMIT)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next((_decoded(cells, f"{name}:1") for cells in reader), None)
        if not header:
            raise LorakitError(f"{name} is empty; give a CSV file with a header line")
        _check_header(header, name)
        for cells in reader:
            if cells:
                where = f"{name}:{reader.line_num}"
                yield _row(header, _decoded(cells, where), where)
    except csv.Error as error:
        place = f"{name}:{reader.line_num}"
        raise LorakitError(f"{place}: {error}; mend the row or its quotes") from error


def _decoded(cells: list[str], where: str) -> list[str]:
    """Return the cells, all of them UTF-8; the line of one that is not is known only here."""
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise LorakitError(f"{where}: not UTF-8 text; save the file as UTF-8") from None
    return cells


def _check_header(header: list[str], name: str) -> None:
    for column in header:
        if header.count(column) > 1:
            raise LorakitError(f"{name}:1: column {column!r} stands twice; rename one of them")


def _row(header: list[str], cells: list[str], where: str) -> Record:
    if len(cells) != len(header):
        raise LorakitError(
            f"{where}: {len(cells)} cells where the header has {len(header)}; "
            "mend the row, or quote the text that holds a separator"
        )
    return Record(dict(zip(header, cells, strict=True)), where)


def split_file(folder: str, split: str, names: dict[str, str]) -> str:
    """Return the file of a split inside a data set's folder, whose file names are `names`."""
    path = Path(folder) / names[split]
    if not path.is_file():
        raise LorakitError(f"{folder} has no {names[split]} for --split {split}; check the folder")
    return str(path)
