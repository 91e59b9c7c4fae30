"""Rated sheets: what human raters wrote into them, un-blinded and summed up by file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lorakit.errors import LorakitError
from lorakit.files import STDIO, open_text_output, reading
from lorakit.foreign_text import quote
from lorakit.judging.agreement import (
    interval_distance,
    krippendorff_alpha,
    nominal_distance,
    share_of_equal_pairs,
)
from lorakit.judging.sheets import KeyItem, SheetKey, load_key
from lorakit.records.jsonl import write_records
from lorakit.versions import version_of

_LONGEST_CELL = 1 << 30
_RATING = re.compile(r"[0-9]|10")
_CHOICES = {"A": "A", "B": "B", "TIE": "tie"}

Ratings = Mapping[str, str]  # by item: a number, or A, B or tie


@dataclass(frozen=True)
class Rater:
    """One rater's sheet: the file's name, and the rating of every item."""

    name: str
    ratings: Ratings


def write_rated_summaries(
    sheets: Sequence[str], key_file: str, *, ratings: str | None, output: str
) -> None:
    """Write a summary for each file of predictions to `output`, its items' ratings to `ratings`.

    Every sheet is one rater's and must rate every item of the key. Raises LorakitError naming
    sheet and row.
    """
    key = load_key(key_file)
    raters = [Rater(sheet, read_ratings(sheet, key, key_file)) for sheet in sheets]
    if ratings is not None:
        with open_text_output(ratings) as stream:
            write_records(_lines(key, raters), stream)
    with open_text_output(output) as stream:
        write_records((_summary(file, key, raters) for file in key.files), stream)


def read_ratings(path: str, key: SheetKey, key_file: str) -> Ratings:
    """Return the rating of every item of a key from a rated sheet, checked.

    The columns `item` and `rating` are read, whatever their order, separated by commas, semicolons
    or tabs, as spreadsheets write them. Raises LorakitError naming the sheet and its row for a
    rating that is missing or malformed, and for an item that is unknown, missing or there twice.
    """
    known = {item.item for item in key.items}
    ratings: dict[str, str] = {}
    for row, item, text in _cells(path):
        where = f"{_name(path)}, row {row}"
        if item not in known:
            raise LorakitError(
                f"{where}: the item {quote(item)} is not in {key_file}; give the sheet that was "
                "exported with this key, its column 'item' as it was"
            )
        if item in ratings:
            raise LorakitError(f"{where}: a second row of item {item}; keep one")
        ratings[item] = _parse(text, where, item, preference=key.against is not None)
    if missing := [item.item for item in key.items if item.item not in ratings]:
        raise LorakitError(
            f"{_name(path)}: no row of item {missing[0]} ({len(missing)} of {len(known)} items are "
            "missing); keep and rate every row of the exported sheet"
        )
    return ratings


def _name(path: str) -> str:
    return "stdin" if path == STDIO else path


def _cells(path: str) -> Iterator[tuple[int, str, str]]:
    """Yield the number, the item and the rating of every row that is not empty; the first is 1."""
    rows = _rows(path)
    _, header = next(rows, (1, []))
    names = [name.strip().lower() for name in header]
    for name in ("item", "rating"):
        if names.count(name) != 1:
            raise LorakitError(
                f"{_name(path)}, row 1: there is no one column {name!r}; keep the first row of the "
                "exported sheet, and save it as CSV"
            )
    for number, row in rows:
        if any(cell.strip() for cell in row):
            cells = dict(zip(names, row, strict=False))
            yield number, cells.get("item", "").strip(), cells.get("rating", "").strip()


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file with their numbers, as a spreadsheet counts them."""
    with reading(path) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LorakitError(
            f"{_name(path)}: not UTF-8 text (byte {error.start + 1}); save it as CSV in UTF-8"
        ) from None
    csv.field_size_limit(_LONGEST_CELL)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    number = 0
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for number, row in enumerate(reader, 1):
            yield number, row
    except csv.Error as error:
        raise LorakitError(
            f"{_name(path)}, row {number + 1}: not CSV ({error}); save the sheet as CSV again"
        ) from None


def _parse(text: str, where: str, item: str, *, preference: bool) -> str:
    """Return a rating as it is counted; raise LorakitError where it is none."""
    rating = _CHOICES.get(text.upper()) if preference else text
    if rating is not None and (preference or _RATING.fullmatch(rating)):
        return rating
    wanted = "A, B or tie" if preference else "a whole number from 0 to 10"
    if not text:
        raise LorakitError(f"{where}: item {item} has no rating; write {wanted} there")
    raise LorakitError(
        f"{where}: the rating {quote(text)} of item {item} is not valid; write {wanted}"
    )


def _summary(file: str, key: SheetKey, raters: Sequence[Rater]) -> Mapping[str, object]:
    """Return the summary of a file: its mean over raters, each rater's, and their agreement."""
    items = [item for item in key.items if item.file == file]
    numbers = _preferences(items, raters) if key.against is not None else _means(items, raters)
    names = "+".join(rater.name for rater in raters)
    return {
        **_head(file, key),
        "count": len(items),
        **numbers,
        "signature": f"raters:{names}|{key.signature}|version:lorakit-{version_of('lorakit')}",
    }


def _head(file: str, key: SheetKey) -> dict[str, object]:
    return {"file": file} if key.against is None else {"file": file, "against": key.against}


def _means(items: Sequence[KeyItem], raters: Sequence[Rater]) -> Mapping[str, object]:
    """Return the mean rating in percent, over raters and of each, as a judge's `gpt_score` is."""
    by_item = [[int(rater.ratings[item.item]) for rater in raters] for item in items]
    means = [10 * fmean(ratings) for ratings in zip(*by_item, strict=True)]
    judges = {
        rater.name: {"rating": mean, "rated": len(items)}
        for rater, mean in zip(raters, means, strict=True)
    }
    summary: dict[str, object] = {"rating": fmean(means), "judges": judges}
    if len(raters) > 1:
        alpha = krippendorff_alpha(by_item, interval_distance)
        summary["agreement"] = _agreement(alpha, "interval", share_of_equal_pairs(by_item))
    return summary


def _preferences(items: Sequence[KeyItem], raters: Sequence[Rater]) -> Mapping[str, object]:
    """Return (wins + ties/2) in percent, over raters and of each, as `preference_summary` does."""
    by_item = [[_outcome(item, rater) for rater in raters] for item in items]
    judges = {
        rater.name: _preferred(outcomes, [rater.ratings[item.item] for item in items])
        for rater, outcomes in zip(raters, zip(*by_item, strict=True), strict=True)
    }
    mean = fmean(float(judge["preference"] or 0) for judge in judges.values())
    summary: dict[str, object] = {"preference": mean, "judges": judges}
    if len(raters) > 1:
        alpha = krippendorff_alpha(by_item, nominal_distance)
        summary["agreement"] = _agreement(alpha, "nominal", share_of_equal_pairs(by_item))
    return summary


def _agreement(alpha: float | None, level: str, same: float | None) -> Mapping[str, object]:
    """Return alpha at its level of measurement, and the raw agreement in percent."""
    return {"alpha": alpha, "level": level, "same": same}


def _outcome(item: KeyItem, rater: Rater) -> str:
    """Return what a rater's choice means for the file: win, tie or loss."""
    choice = rater.ratings[item.item]
    if choice == "tie":
        return "tie"
    return "win" if (choice == "A") == (item.first == "file") else "loss"


def _preferred(outcomes: Sequence[str], choices: Sequence[str]) -> Mapping[str, float | None]:
    """Return one rater's choices; `first` is the share of A among them: 50 is no bias."""
    wins, ties, losses = (outcomes.count(name) for name in ("win", "tie", "loss"))
    chosen = [choice for choice in choices if choice != "tie"]
    return {
        "preference": 100 * (wins + ties / 2) / len(outcomes),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "first": 100 * chosen.count("A") / len(chosen) if chosen else None,
    }


def _lines(key: SheetKey, raters: Sequence[Rater]) -> Iterator[Mapping[str, object]]:
    """Yield the ratings of each item by rater, un-blinded, in the order of the sheet."""
    for item in key.items:
        head = {**_head(item.file, key), "id": item.id}
        if key.against is None:
            yield {
                **head,
                "ratings": {rater.name: int(rater.ratings[item.item]) for rater in raters},
            }
        else:
            yield {**head, "choices": {rater.name: _outcome(item, rater) for rater in raters}}
