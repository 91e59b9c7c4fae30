"""Read files of predictions, and check that several of them are for the same records.

This file knows no metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from lorakit.errors import LorakitError
from lorakit.files import input_name
from lorakit.foreign_text import quote
from lorakit.records.jsonl import read_records
from lorakit.records.record import Record


@dataclass(frozen=True)
class Texts:
    """The texts of a file, with the ids and places (`file:line`) by which to check and name them.

    `groups` are the values, as JSON, of the field by which examples are grouped, if any.
    """

    path: str
    predictions: list[str]
    references: list[list[str]]
    ids: list[str | None]
    places: list[str]
    groups: list[str]


def load_texts(path: str, group_by: str | None = None) -> Texts:
    """Return the texts of a JSONL file (`-`: stdin) and its values of the field `group_by`.

    Raises LorakitError naming file and line where a record lacks something, and for no records.
    """
    return texts_of(path, read_records(path, "prediction"), group_by)


def texts_of(path: str, records: Iterable[Record], group_by: str | None = None) -> Texts:
    """Return the texts of the records of a file; raise LorakitError as `load_texts` does."""
    texts = Texts(path, [], [], [], [], [])
    for record in records:
        texts.predictions.append(record.prediction)
        texts.references.append(references_of(record))
        texts.ids.append(record.id if "id" in record.fields else None)
        texts.places.append(record.where)
        if group_by is not None:
            if group_by not in record.fields:
                raise LorakitError(
                    f"{record.where}: the record has no field {group_by!r}; give --group-by a "
                    "field that every record has"
                )
            texts.groups.append(json.dumps(record.fields[group_by], sort_keys=True))
    if not texts.predictions:
        raise LorakitError(f"{input_name(path)} holds no records; check what wrote it")
    return texts


_SAME_RECORDS = "compare predictions for the same records in the same order"


def check_aligned(texts: Texts, other: Texts) -> None:
    """Raise LorakitError where two files do not hold predictions for the same records, in order.

    Ids are compared where both records have one, references always, and the values of the field by
    which examples are grouped, if there is one.
    """
    pairs = zip(texts.places, other.places, texts.ids, other.ids, strict=False)
    for number, (here, there, ours, theirs) in enumerate(pairs):
        if ours != theirs and ours is not None and theirs is not None:
            raise LorakitError(f"{here}: the id {ours!r} is {theirs!r} at {there}; {_SAME_RECORDS}")
        if texts.references[number] != other.references[number]:
            raise LorakitError(f"{here}: the references are not those at {there}; {_SAME_RECORDS}")
        if texts.groups and other.groups and texts.groups[number] != other.groups[number]:
            group, there_group = (quote(side.groups[number])[1:-1] for side in (texts, other))
            raise LorakitError(
                f"{here}: the group {group} is {there_group} at {there}; "
                "give --group-by a field that all files agree on"
            )
    _check_no_longer(texts, other)
    _check_no_longer(other, texts)


def _check_no_longer(texts: Texts, other: Texts) -> None:
    """Raise LorakitError where the first file has more records than the second."""
    count = len(other.places)
    if len(texts.places) > count:
        raise LorakitError(
            f"{texts.places[count]}: there is no such record in "
            f"{input_name(other.path)}, which ends after {count}; {_SAME_RECORDS}"
        )


def references_of(record: Record) -> list[str]:
    """Return the texts to compare a prediction with; raise LorakitError where there are none."""
    if not record.has_references:
        raise LorakitError(
            f"{record.where}: the record has neither 'references' nor 'completion'; "
            "give the texts to compare the prediction with"
        )
    return record.references
