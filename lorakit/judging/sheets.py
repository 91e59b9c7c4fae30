"""Sheets for human raters: predictions as rows of a CSV file that names no system, and its key.

Rows of all systems stand in one order drawn from the seed. The key, a file beside the sheet, says
which row is whose; rated_sheets.py reads both back.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from lorakit.errors import LorakitError
from lorakit.files import check_output, open_text_output, reading
from lorakit.foreign_text import parse_json
from lorakit.judging.questions import paired_records, reference_of
from lorakit.records.jsonl import load_records
from lorakit.records.record import Record
from lorakit.runs.resume import run_key
from lorakit.settings import SheetSettings

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_BYTE_ORDER_MARK = "\ufeff"  # without it, Excel takes UTF-8 for another encoding


@dataclass(frozen=True)
class KeyItem:
    """Whose prediction a row of a sheet holds: the record's `id` in `file`.

    `first` says whose output stands under `a` in a row with two.
    """

    item: str
    file: str
    id: str
    first: Literal["file", "against"] | None = None


@dataclass(frozen=True)
class SheetKey:
    """What un-blinds a sheet: its rows in order, and how they were drawn."""

    sheet: str
    files: tuple[str, ...]
    against: str | None
    sample: int | None
    seed: int
    items: tuple[KeyItem, ...]

    @property
    def signature(self) -> str:
        """What the numbers of a rated sheet depend on besides the data and the raters."""
        sample = "all" if self.sample is None else self.sample
        return f"sheet:{self.sheet}|sample:{sample}|seed:{self.seed}"


@dataclass(frozen=True)
class _Row:
    """A row before it is numbered: its place in the key, and the texts that raters read."""

    file: str
    id: str
    prompt: str
    reference: str
    outputs: tuple[str, ...]
    first: Literal["file", "against"] | None = None


def key_path(sheet: str) -> str:
    """Return where the key of a sheet lies: `sheet.key.json` for `sheet.csv`."""
    return str(Path(sheet).with_suffix(".key.json"))


def export_sheet(
    paths: Sequence[str], sheet: str, *, against: str | None, settings: SheetSettings
) -> SheetKey:
    """Write the sheet of some files of predictions, and its key beside it; return the key.

    With `against`, a row holds two outputs to choose from, in an order drawn for it. A sample is
    drawn from every file; files of the same length give the same records. Raises LorakitError
    naming file and line.
    """
    for path in (sheet, key_path(sheet)):
        check_output(path)
    draws = random.Random(f"order {settings.seed}")
    baseline = None if against is None else load_records(against, "prediction", "prompt")[0]
    rows = [row for path in paths for row in _sampled(_rows(path, baseline), settings)]
    draws.shuffle(rows)
    if against is not None:
        rows = [_swapped(row) if draws.random() < 0.5 else row for row in rows]
    name = run_key(*([asdict(row) for row in rows]))[:6]
    items = tuple(
        KeyItem(f"i{number}-{name}", row.file, row.id, row.first)
        for number, row in enumerate(rows, 1)
    )
    key = SheetKey(name, tuple(paths), against, settings.sample, settings.seed, items)
    with open_text_output(sheet) as stream:
        _write_sheet(rows, items, stream, ("output",) if against is None else ("a", "b"))
    with open_text_output(key_path(sheet)) as stream:
        json.dump(asdict(key), stream, indent=1)
        stream.write("\n")
    return key


def _rows(path: str, baseline: Sequence[Record] | None) -> list[_Row]:
    """Return a row for every record of a file; where there are two outputs, the file's first."""
    if baseline is None:
        records, _ = load_records(path, "prediction", "prompt")
        return [_row(path, record, record.prediction) for record in records]
    return [
        _row(path, record, record.prediction, other.prediction)
        for record, other in paired_records(path, baseline)
    ]


def _row(path: str, record: Record, *outputs: str) -> _Row:
    first: Literal["file"] | None = "file" if len(outputs) > 1 else None
    return _Row(path, record.id, record.prompt, reference_of(record) or "", outputs, first)


def _swapped(row: _Row) -> _Row:
    outputs = row.outputs[::-1]
    return _Row(row.file, row.id, row.prompt, row.reference, outputs, "against")


def _sampled(rows: list[_Row], settings: SheetSettings) -> list[_Row]:
    """Return as many rows as are asked for, in order; all of them where there are no more."""
    if settings.sample is None or settings.sample >= len(rows):
        return rows
    places = random.Random(f"sample {settings.seed}").sample(range(len(rows)), settings.sample)
    return [rows[place] for place in sorted(places)]


def _write_sheet(
    rows: Iterable[_Row], items: Iterable[KeyItem], stream: IO[str], outputs: tuple[str, ...]
) -> None:
    stream.write(_BYTE_ORDER_MARK)
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
    writer.writerow(("item", "prompt", "reference", *outputs, "rating"))
    for row, item in zip(rows, items, strict=True):
        texts = (row.prompt, row.reference, *row.outputs)
        writer.writerow((item.item, *map(safe_cell, texts), ""))


def safe_cell(text: str) -> str:
    """Return a text as a cell that no spreadsheet runs as a formula.

    An apostrophe goes before what begins with = + - @, their wide forms, a tab or a line break.
    What UTF-8 cannot hold (half a surrogate pair) is escaped, and so is NUL.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def load_key(path: str) -> SheetKey:
    """Return the key in a file; raise LorakitError where there is none in it."""
    try:
        with reading(path) as stream:
            return _parse_key(stream.read().decode("utf-8"))
    except (KeyError, TypeError, ValueError):
        raise LorakitError(
            f"{path} is not the key of a sheet; give the .key.json that --export-sheet wrote"
        ) from None


def _parse_key(text: str) -> SheetKey:
    """Return the key that a text holds; KeyError, TypeError or ValueError where it holds none."""
    fields = parse_json(text)
    key = SheetKey(
        **{
            **fields,
            "files": tuple(map(str, fields["files"])),
            "items": tuple(KeyItem(**item) for item in fields["items"]),
        }
    )
    sides = (None,) if key.against is None else ("file", "against")
    for item in key.items:
        if item.file not in key.files or item.first not in sides:
            raise ValueError("an item of no file")
        if not (isinstance(item.item, str) and isinstance(item.id, str)):
            raise TypeError("an item's name or its record's id is no text")
    return key
