"""The files that `score` reads: texts by record, and whether two files are of the same records."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lorakit.errors import LorakitError
from lorakit.files import STDIO
from lorakit.records import Record, read_records


@dataclass(frozen=True)
class Texts:
    """What is kept of a file: texts, and ids and places (`file:line`) to check and name them."""

    path: str
    predictions: list[str]
    references: list[list[str]]
    ids: list[str | None]
    places: list[str]
    groups: list[str]  # the values, as JSON, of the field that groups are made by


def load_texts(path: str, group_by: str | None = None) -> Texts:
    """Return the texts of a JSONL file (`-`: stdin), and the values of a field of its records.

    Raises LorakitError naming file and line.
    """
    texts = Texts(path, [], [], [], [], [])
    for record in read_records(path, "prediction"):
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
        name = "stdin" if path == STDIO else path
        raise LorakitError(f"{name} holds no records; check what wrote it")
    return texts


def check_alike(texts: Texts, other: Texts) -> None:
    """Raise LorakitError where two files are not predictions for the same records, in order.

    Ids are compared where both records have one, references always.
    """
    remedy = "compare predictions for the same records in the same order"
    both = zip(texts.places, other.places, texts.ids, other.ids, strict=False)
    for place, (here, there, ours, theirs) in enumerate(both):
        if ours != theirs and ours is not None and theirs is not None:
            raise LorakitError(f"{here}: the id {ours!r} is {theirs!r} at {there}; {remedy}")
        if texts.references[place] != other.references[place]:
            raise LorakitError(f"{here}: the references are not those at {there}; {remedy}")
    common = min(len(texts.places), len(other.places))
    for longer, shorter in ((texts, other), (other, texts)):
        if len(longer.places) > common:
            raise LorakitError(
                f"{longer.places[common]}: there is no such record in "
                f"{'stdin' if shorter.path == STDIO else shorter.path}, which ends after "
                f"{common}; {remedy}"
            )


def references_of(record: Record) -> list[str]:
    """Return what a prediction is compared with; LorakitError where the record has nothing."""
    if record.fields.get("references") is None and "completion" not in record.fields:
        raise LorakitError(
            f"{record.where}: the record has neither 'references' nor 'completion'; "
            "give the texts to compare the prediction with"
        )
    return record.references
