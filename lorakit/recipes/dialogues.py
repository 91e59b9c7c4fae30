"""Dialogues: SAMSum and DialogSum with summaries, E-commerce with whether a response fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorakit.errors import LorakitError
from lorakit.recipes.filters import unspaced
from lorakit.recipes.readers.rows import (
    converted,
    id_of,
    lines_in,
    rest_of,
    split_names,
    split_parts,
    stripped,
    text_of,
)
from lorakit.recipes.readers.tables import rows_in
from lorakit.recipes.request import Request, Tally
from lorakit.records.record import Record

_SUMMARIES = ("summary", "summary1", "summary2", "summary3")
_ANSWERS = {"0": "No", "1": "Yes"}


def samsum_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield SAMSum's dialogues and summaries (Gliwa et al., 2019).

    A source is a JSON file (an array, or lines), a CSV file with the same fields, or the folder
    with the split's file. A line:

        {"id": "13818513", "summary": "Amanda baked cookies and will bring Jerry some tomorrow.",
         "dialogue": "Amanda: I baked  cookies. Do you want some?\\r\\nJerry: Sure!"}
    """
    names = split_names("{}.json", "{}.jsonl", "{}.csv")
    for part in split_parts(sources, request, tally, names):
        yield from converted(rows_in(part, tally), _summarized, tally)


def dialogsum_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield DialogSum's dialogues and summaries (Chen et al., 2021), in the test set three of each.

    A source is a JSONL or CSV file, or the folder with the split's file. A line:

        {"fname": "test_0", "dialogue": "#Person1#: Take a memo.\\n#Person2#: Yes, sir.",
         "summary1": "#Person2# takes a memo.", "summary2": "#Person1# dictates a memo.",
         "summary3": "#Person2# is to write a memo.", "topic1": "dictation"}
    """
    names = split_names("dialogsum.{}.jsonl", "{}.jsonl", "{}.csv")
    for part in split_parts(sources, request, tally, names):
        yield from converted(rows_in(part, tally), _summarized, tally)


def _summarized(row: Record) -> Record:
    """Return the row of a dialogue and its summary; several summaries become references."""
    dialogue = "\n".join(text_of(row, "dialogue").splitlines())
    summaries = [text_of(row, name) for name in _SUMMARIES if name in row.fields]
    if not summaries:
        raise LorakitError(f"{row.where}: no field 'summary'; check that this is the data set")
    references = {"references": summaries} if len(summaries) > 1 else {}
    fields = {"id": id_of(row, "id", "fname"), "dialogue": dialogue, "summary": summaries[0]}
    rest = rest_of(row, "dialogue", "fname", *_SUMMARIES)
    return Record({**fields, **references, **rest}, row.where)


def ecommerce_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield E-commerce's dialogues, candidate responses and Yes or No (Zhang et al., 2018).

    A source is a file of lines with a label, the utterances and the response between tabs, words
    separated by spaces, or the folder with the split's file:

        1⇥有 现货 吗⇥亲 , 有 的⇥什么 时候 发货⇥今天 就 可以 发货 的 哦
    """
    for part in split_parts(sources, request, tally, split_names("{}.txt", "{}.tsv")):
        lines = lines_in(part, tally)
        rows = (Record({"line": line}, where) for where, line in lines if line)
        yield from converted(rows, _response, tally)


def _response(row: Record) -> Record:
    """Return the row of a dialogue and a response, cut at the tabs of a line."""
    label, *turns = str(row.fields["line"]).split("\t")
    if label not in _ANSWERS or len(turns) < 2:
        raise LorakitError(
            f"{row.where}: not a label (0 or 1), utterances and a response between tabs; "
            "mend the row"
        )
    *dialogue, response = (unspaced(stripped(turn, row.where)) for turn in turns)
    fields = {"dialogue": "\n".join(dialogue), "response": response, "answer": _ANSWERS[label]}
    return Record({"id": id_of(row), **fields}, row.where)
