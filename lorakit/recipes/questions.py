"""Questions and answers: HotpotQA, GSM8K and JEMHopQA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from lorakit.errors import LorakitError
from lorakit.recipes.readers.rows import (
    converted,
    id_of,
    objects_in,
    rest_of,
    split_names,
    split_parts,
    text_of,
)
from lorakit.recipes.readers.sources import Part
from lorakit.recipes.request import Request, Tally, split_aliases
from lorakit.records.record import Record

_HOTPOT_FILES = {
    "train": ("hotpot_train*.json",),
    "validation": ("hotpot_dev_distractor*.json",),
}
_GSM8K_FILES = {"train": ("train.jsonl",), "test": ("test.jsonl",)}


def hotpotqa_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield HotpotQA's questions over paragraphs, the distractor setting (Yang et al., 2018).

    A source is the JSON file, or the folder with the split's file. The published test set has no
    answers; the boundary-layer paper tests on the validation set, and a file that is not
    named after the split gets a warning. A row:

        {"_id": "5a7574e25542996c70cfaf01", "type": "comparison", "level": "hard",
         "question": "Who was born first, Mahbub ul Haq or Ibn Arabi?", "answer": "Ibn Arabi",
         "supporting_facts": [["Mahbub ul Haq", 0], ["Ibn Arabi", 0]],
         "context": [["Mahbub ul Haq", ["Mahbub ul Haq (born 1934) was an economist."]],
                     ["Ibn Arabi", ["Ibn Arabi (1165 – 1240) was a scholar.", " He wrote much."]]]}
    """
    for part in split_parts(sources, request, tally, _HOTPOT_FILES):
        _warn_of_shared_file(part, request, tally)
        yield from converted(objects_in(part, tally), _hotpot, tally)


def _hotpot(row: Record) -> Record:
    """Return the row of a question, its paragraphs and its answer."""
    fields = {
        "id": id_of(row, "_id", "id"),
        "paragraphs": _paragraphs(row.fields.get("context"), row.where),
        "question": text_of(row, "question"),
        "answer": text_of(row, "answer"),
    }
    rest = rest_of(row, "_id", "id", "context", "question", "answer")
    return Record({**fields, **rest}, row.where)


def _paragraphs(context: object, where: str) -> str:
    """Return the paragraphs, one a line, with title and text.

    `context` is a list of pairs of title and sentences, as HotpotQA publishes it, or a dict with a
    list of each, as the hub does.
    """
    try:
        if isinstance(context, dict):
            titles, texts = context.get("title", ()), context.get("sentences", ())
            context = list(zip(titles, texts, strict=False))
        paragraphs = cast(Iterable[tuple[str, Iterable[str]]], context)
        pairs = [(title, "".join(sentences)) for title, sentences in paragraphs]
    except (TypeError, ValueError):
        raise LorakitError(
            f"{where}: 'context' is not a list of titles with sentences; give HotpotQA's own file"
        ) from None
    return "\n".join(f"{title}: {text.strip()}" for title, text in pairs)


def gsm8k_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield GSM8K's word problems and worked answers with their calculations (Cobbe et al., 2021).

    A source is a JSONL file or the folder with the split's file. There is no validation set; a file
    that is not named after the split gets a warning. A line:

        {"question": "Natalia sold 48 clips in April and half as many in May. How many in all?",
         "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\\n#### 72"}
    """
    for part in split_parts(sources, request, tally, _GSM8K_FILES):
        _warn_of_shared_file(part, request, tally)
        yield from converted(objects_in(part, tally), _question, tally)


def _warn_of_shared_file(part: Part, request: Request, tally: Tally) -> None:
    """Warn that a file whose name does not say the split may be validation and test set at once.

    HotpotQA publishes no test set and GSM8K no validation set, and the sizes in the
    inference-necessity paper suggest that it took one file for both.
    """
    words = re.split(r"[^a-z]+", part.inside.lower())
    if request.split != "train" and not {*words} & {*split_aliases(request.split)}:
        tally.say(
            f"Warning: nothing in the name of {part.name} says {request.split}, and the papers' "
            "validation and test sets may be the same file; for two that share nothing, draw one "
            "by --sample N -o val.jsonl and the other with --drop-overlap val.jsonl."
        )


def jemhopqa_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield JEMHopQA's Japanese multi-hop questions (Ishii et al., 2024) with their derivations.

    A source is a JSON file or the folder with the split's file. A row:

        {"qid": "a6c300397ad4c16dd02702a32bf6ebd6", "type": "comparison", "answer": "YES",
         "question": "奥州市と酒田市はどちらも東北地方の都市ですか？",
         "derivations": [["奥州市", "地方", ["東北地方"]], ["酒田市", "地方", ["東北地方"]]]}
    """
    names = split_names("{}.json", "{}_ver*.json")
    for part in split_parts(sources, request, tally, names):
        yield from converted(objects_in(part, tally), _question, tally)


def _question(row: Record) -> Record:
    """Return the row of a question and its answer."""
    fields = {"question": text_of(row, "question"), "answer": text_of(row, "answer")}
    rest = rest_of(row, "id", "qid", "question", "answer")
    return Record({"id": id_of(row, "id", "qid"), **fields, **rest}, row.where)
