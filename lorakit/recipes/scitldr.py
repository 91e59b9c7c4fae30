"""SciTLDR: scientific papers and their one-sentence summaries (Cachola et al., 2020).

A line of the published JSONL files (train.jsonl, dev.jsonl, test.jsonl), shortened:

    {"source": ["We study …", "Our model …"], "target": ["A model that …", "We show …"],
     "paper_id": "rJlMBjAcYX", "title": "…"}
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from lorakit.errors import LorakitError
from lorakit.recipes.rows import json_rows, split_file
from lorakit.records import Record

FILES = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}


def scitldr_rows(sources: Sequence[str], split: str) -> Iterator[Record]:
    """Yield rows with `id`, `article`, `tldr`, `references` (every TLDR) and `title`.

    A source is the data set's folder, of which the split's file is read, or a file.
    """
    paths = [split_file(path, split, FILES) if os.path.isdir(path) else path for path in sources]
    for row in json_rows(paths):
        targets = _texts(row, "target")
        fields = {
            "id": str(row.fields.get("paper_id", row.where)),
            "article": " ".join(_texts(row, "source")),
            "tldr": targets[0],
            "references": targets,
            "title": row.fields.get("title", ""),
        }
        yield Record(fields, row.where)


def _texts(row: Record, name: str) -> list[str]:
    found = row.fields.get(name)
    if not (isinstance(found, list) and all(isinstance(text, str) for text in found)):
        raise LorakitError(
            f"{row.where}: {name!r} is not a list of texts; give SciTLDR's own JSONL file"
        )
    texts = [text.strip() for text in found if text.strip()]
    if not texts:
        raise LorakitError(f"{row.where}: {name!r} holds no text; drop the record")
    return texts
