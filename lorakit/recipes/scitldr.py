"""SciTLDR: scientific papers and their one-sentence summaries (Cachola et al., 2020).

The published forms A (abstract), AIC (abstract, introduction and conclusion, as in the
adaptive-merge paper) and FullText differ in what `source` holds; a test paper has several TLDRs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorakit.errors import LorakitError
from lorakit.recipes.readers.rows import converted, objects_in, split_parts
from lorakit.recipes.request import Request, Tally
from lorakit.records.record import Record

_FILES = {"train": ("train.jsonl",), "validation": ("dev.jsonl",), "test": ("test.jsonl",)}


def scitldr_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield rows with `id`, `article`, `tldr`, `references` (every TLDR) and `title`.

    A source is the data set's folder, from which the split's file is read, or a file. A line:

        {"source": ["We study the loss of linear networks.", "Our analysis is exact."],
         "source_labels": [1, 0], "paper_id": "SysEexbRb",
         "target": ["We give the critical points of linear networks' losses in closed form."],
         "title": "Critical Points of Linear Neural Networks"}
    """
    if not sources:
        raise LorakitError("scitldr needs its folder or a file as SOURCE; name one")
    for part in split_parts(sources, request, tally, _FILES):
        yield from converted(objects_in(part, tally), _paper, tally)


def _paper(row: Record) -> Record:
    """Return the row of a paper and its TLDRs."""
    targets = _texts(row, "target")
    fields = {
        "id": str(row.fields.get("paper_id", row.where)),
        "article": " ".join(_texts(row, "source")),
        "tldr": targets[0],
        "references": targets,
        "title": row.fields.get("title", ""),
    }
    return Record(fields, row.where)


def _texts(row: Record, name: str) -> list[str]:
    """Return the texts of a list, or of a list of lists: FullText has the sentences by section."""
    value = row.fields.get(name)
    items = value if isinstance(value, list) else [None]
    flat = [text for item in items for text in (item if isinstance(item, list) else [item])]
    texts = [text.strip() for text in flat if isinstance(text, str)]
    if len(texts) < len(flat):
        raise LorakitError(
            f"{row.where}: {name!r} is not a list of texts; give SciTLDR's own JSONL file"
        )
    texts = [text for text in texts if text]
    if not texts:
        raise LorakitError(f"{row.where}: {name!r} holds no text; drop the record")
    return texts
