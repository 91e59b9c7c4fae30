"""Print the boundary-layer paper's tables from the scores that boundary_layer.sh has saved.

python examples/boundary_table.py boundary/scores.jsonl
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from lorakit.records import read_objects

TITLES = {
    1: "Table 1: fine-tuned, bottom layers trained only, cut at the boundary",
    6: "Table 6: ranks",
    7: "Table 7: the questions' adapter on other tasks, with its own boundary",
    3: "Outputs that contain the uncut adapter's output: of all, and of those with a lower F1",
}
SYSTEMS = {"tuned": "fine-tuned", "partial": "partial", "tuned.ours": "ours"}
NOT_METRICS = {"table", "task", "file", "count", "lang", "signatures", "significance"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores")
    given = parser.parse_args()
    tables: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in read_objects(given.scores):
        fields = record.fields
        name = Path(fields["file"]).stem
        for metric in fields.keys() - NOT_METRICS:
            column = f"{fields['task']} {metric}"
            tables[fields["table"]][SYSTEMS.get(name, name)][column] = fields[metric]
    for number, title in TITLES.items():
        rows = tables[number]
        columns = sorted({column for row in rows.values() for column in row})
        if rows:
            print(f"{title}\n")
            print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for name, row in rows.items():
            cells = [f"{row[column]:.1f}" if column in row else "–" for column in columns]
            print(f"| {name} | {' | '.join(cells)} |")
        if rows:
            print()


if __name__ == "__main__":
    main()
