"""Turn DialogSum's lines into a labelling task: does the summary belong to the dialogue, Yes or No?

    python yesno.py dialogsum.dev.jsonl > rows.jsonl

Every dialogue comes once: with its own summary or, every other one, with that of the dialogue half
the file away. The rows have the fields `dialogue`, `summary` and `label`.
"""

from __future__ import annotations

import json
import sys

from lorakit.records.jsonl import read_objects


def main() -> None:
    rows = [record.fields for record in read_objects(sys.argv[1])]
    for number, row in enumerate(rows):
        fits = number % 2 == 0
        other = row if fits else rows[(number + len(rows) // 2) % len(rows)]
        summary = other.get("summary") or other["summary1"]
        label = "Yes" if fits else "No"
        print(json.dumps({"dialogue": row["dialogue"], "summary": summary, "label": label}))


if __name__ == "__main__":
    main()
