"""Read the rows of Parquet files with pyarrow, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lorakit.errors import LorakitError, check_packages, missing_package
from lorakit.recipes.readers.sources import Part, parts, seekable
from lorakit.recipes.request import Request, Tally
from lorakit.records.record import Record

_BATCH = 256


def parquet_rows(sources: Sequence[str], _: Request, tally: Tally) -> Iterator[Record]:
    """Yield the rows of Parquet files (no source: stdin); --template names their columns.

    A row, as JSON:

        {"id": "n1", "prompt": "Summarize: A long, long text.", "completion": " Short."}
    """
    check_packages("reading Parquet", "pyarrow", extra="parquet")
    for part in parts(sources, tally, ("*.parquet",)):
        yield from parquet_in(part, tally)


def parquet_in(part: Part, tally: Tally) -> Iterator[Record]:
    """Yield the rows of one file; values that JSON cannot express become texts."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise missing_package("reading Parquet", "pyarrow", "parquet") from None
    number = 0
    try:
        with seekable(part.stream, part.path) as file, parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(plain_row(fields), f"{part.name}: record {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a name
        raise LorakitError(
            f"{part.name}: not Parquet ({str(error).splitlines()[0]}); check that it is whole"
        ) from error


def plain_row(fields: Mapping[str, object]) -> dict[str, object]:
    """Return a row of pyarrow's in JSON's types."""
    return {str(name): _plain(value) for name, value in fields.items()}


def _plain(value: object) -> object:
    """Return a value in JSON's types; bytes that are not UTF-8 become null."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return _text(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _text(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None
