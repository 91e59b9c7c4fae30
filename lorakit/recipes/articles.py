"""News articles and their summaries in files of rows: XL-Sum and Japanese Wikinews."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorakit.errors import LorakitError
from lorakit.recipes.filters import unspaced
from lorakit.recipes.readers.rows import (
    converted,
    id_of,
    lines_in,
    objects_in,
    rest_of,
    split_names,
    split_parts,
    stripped,
    text_of,
)
from lorakit.recipes.readers.sources import parts
from lorakit.recipes.request import Request, Tally
from lorakit.records.record import Record

_LANGUAGES = {"en": "english", "ja": "japanese", "zh": "chinese_simplified"}


def xlsum_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield XL-Sum's BBC articles and summaries (Hasan et al., 2021), one language per file.

    A source is a file such as japanese_train.jsonl, or the folder or tar archive with the split's
    file (in --lang). A line:

        {"id": "japanese-55031622", "url": "https://www.bbc.com/japanese/55031622",
         "title": "英で新たな規制", "summary": "英政府は17日、新たな規制を発表した。",
         "text": "英首相は17日、記者会見で新たな規制について説明した。"}
    """
    language = _LANGUAGES[request.lang] if request.lang else "*"
    names = split_names(f"{language}_{{}}.jsonl", "{}.jsonl")
    for part in split_parts(sources, request, tally, names):
        yield from converted(objects_in(part, tally), _xlsum, tally)


def _xlsum(row: Record) -> Record:
    """Return the row of an article and its summary."""
    fields = {
        "id": id_of(row, "id"),
        "article": text_of(row, "text"),
        "summary": text_of(row, "summary"),
    }
    return Record({**fields, **rest_of(row, "text", "summary")}, row.where)


def jawikinews_rows(sources: Sequence[str], _: Request, tally: Tally) -> Iterator[Record]:
    """Yield Japanese Wikinews articles and headlines, without the spaces between their words.

    A source is a TSV file with the columns id, article and headline:

        id⇥article⇥headline
        7⇥気象庁 は 4 月 7 日 、 地震 が 発生 し た と 発表 し た 。⇥宮城 県 で 地震
    """
    for part in parts(sources, tally, ("*.tsv",)):
        lines = lines_in(part, tally)
        header = next(lines, ("", ""))[1]
        if header != "id\tarticle\theadline":
            raise LorakitError(f"{part.name}:1: no header id, article, headline; check the file")
        rows = (Record({"line": line}, where) for where, line in lines if line is not None)
        yield from converted(rows, _headline, tally)


def _headline(row: Record) -> Record:
    """Return the row of an article and its headline, cut at the tabs of a line."""
    cells = str(row.fields["line"]).split("\t")
    if len(cells) != 3:
        raise LorakitError(f"{row.where}: {len(cells)} cells where there are three; mend the row")
    article, headline = (unspaced(stripped(cell, row.where)) for cell in cells[1:])
    return Record({"id": cells[0], "article": article, "headline": headline}, row.where)
