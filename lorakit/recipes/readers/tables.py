"""Read the raw rows of CSV and TSV tables with a header line, each with its place in the file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import partial

from lorakit.errors import LorakitError
from lorakit.recipes.readers.rows import first_character, objects_in
from lorakit.recipes.readers.sources import Part, parts
from lorakit.recipes.request import Request, Tally
from lorakit.records.record import Record

_LONGEST_CELL = 1 << 26


def csv_rows(sources: Sequence[str], _: Request, tally: Tally) -> Iterator[Record]:
    """Yield the rows of CSV files with a header line (`.tsv`: tab-separated; no source: stdin).

    Quoted fields may hold line breaks; a byte-order mark is dropped. A table:

        id,prompt,completion
        n1,"Summarize: A long, long text."," Short."
    """
    for part in parts(sources, tally, ("*.csv", "*.tsv")):
        yield from table_in(part, tally)


def table_in(part: Part, tally: Tally) -> Iterator[Record]:
    """Yield the rows of one table.

    Raises LorakitError naming file and line if a row is not whole.
    """
    delimiter = "\t" if part.suffix == ".tsv" else ","
    text = io.TextIOWrapper(part.stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _table(text, part.name, delimiter, tally)
    finally:
        if not part.stream.closed:  # the wrapper would close it
            text.detach()


def _table(text: io.TextIOWrapper, name: str, delimiter: str, tally: Tally) -> Iterator[Record]:
    """Yield the rows below the header line; malformed ones go to the tally."""
    import csv

    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(_limited(text), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        try:
            cells = next(reader, None)
            where = f"{name}:{reader.line_num}"
            if cells is None:
                break
            if not header:
                header = _header(cells, name)
            elif cells:
                yield _row(header, _decoded(cells, where), where)
        except csv.Error as error:
            _reject_cells(f"{name}:{max(reader.line_num, 1)}", error, tally, bool(header))
        except LorakitError as error:
            if not header:
                raise
            tally.reject(error)
    if not header:
        raise LorakitError(f"{name} is empty; give a CSV file with a header line")


def _limited(text: io.TextIOWrapper) -> Iterator[str]:
    """Yield the lines of a table; csv.Error at one so long that csv would fill the memory."""
    import csv

    for line in iter(partial(text.readline, _LONGEST_CELL), ""):
        if len(line) == _LONGEST_CELL:
            raise csv.Error(f"line larger than {_LONGEST_CELL} characters")
        yield line


def _reject_cells(where: str, error: Exception, tally: Tally, has_header: bool) -> None:
    """Reject a row that csv cannot read.

    A row whose open quote took the rest of the file with it is never skipped.
    """
    rejection = LorakitError(f"{where}: {error}; mend the row or its quotes")
    if "unexpected end" in str(error) or "larger than" in str(error) or not has_header:
        raise rejection
    tally.reject(rejection)


def _decoded(cells: list[str], where: str) -> list[str]:
    """Return the cells; LorakitError if one is not UTF-8, which only here can name the line."""
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise LorakitError(f"{where}: not UTF-8 text; save the file as UTF-8") from None
    return cells


def _header(cells: list[str], name: str) -> list[str]:
    """Return the names of the columns; LorakitError if two are the same."""
    for column in _decoded(cells, f"{name}:1"):
        if cells.count(column) > 1:
            raise LorakitError(f"{name}:1: column {column!r} stands twice; rename one of them")
    return cells


def _row(header: list[str], cells: list[str], where: str) -> Record:
    """Return a row's cells by column; LorakitError if there are more or fewer of them."""
    if len(cells) != len(header):
        raise LorakitError(
            f"{where}: {len(cells)} cells where the header has {len(header)}; "
            "mend the row, or quote the text that holds a separator"
        )
    return Record(dict(zip(header, cells, strict=True)), where)


def rows_in(part: Part, tally: Tally) -> Iterator[Record]:
    """Yield the rows of one file: JSON or a table, judging by its first character."""
    is_json = first_character(part) in (b"[", b"{")
    yield from objects_in(part, tally) if is_json else table_in(part, tally)
