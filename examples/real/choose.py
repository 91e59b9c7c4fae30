"""Choose a pruning ratio by the ROUGE-L of its merge's outputs on the validation records.

    python choose.py xs+wl+tgt 0 0.1 0.3

Reads SET.RATIO.val.jsonl in the working directory and writes the best ratio, of equals the lowest,
with all scores to SET.chosen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lorakit.records.jsonl import read_objects
from lorakit.scoring.metrics import score
from lorakit.scoring.texts import references_of


def main() -> None:
    name, *ratios = sys.argv[1:]
    scores = {}
    for ratio in ratios:
        records = list(read_objects(f"{name}.{ratio}.val.jsonl"))
        texts = [record.fields["prediction"] for record in records]
        references = [references_of(record) for record in records]
        scores[ratio] = score(texts, references, metric="rougeL", lang="en").value
    best = max(ratios, key=lambda ratio: (scores[ratio], -float(ratio)))
    Path(f"{name}.chosen").write_text(f"{best}\n{json.dumps(scores)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
