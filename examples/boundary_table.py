"""Print the boundary-layer paper's curves and tables from what boundary_layer.sh has saved.

python examples/boundary_table.py boundary/
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from lorakit.records.jsonl import read_objects

TITLES = {
    1: "Table 1: fine-tuned, bottom layers trained only, cut at the boundary",
    6: "Table 6: ranks",
    7: "Table 7: the questions' adapter on other tasks, with its own boundary",
    3: "Outputs that contain the uncut adapter's output: of all, and of those with a lower F1",
}
SYSTEMS = {"tuned": "fine-tuned", "partial": "partial", "tuned.ours": "ours"}
CURVES = {
    "boundary": "Figure 4: the score when only the bottom k layers keep their LoRA (best in bold)",
    "probability": "Figure 1: mean probability of the first tokens after k layers (knee in bold)",
}
NOT_METRICS = {"table", "task", "file", "count", "lang", "signatures", "significance"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for kind, title in CURVES.items():
        print_curves(folder, kind, title)
    print_tables(folder)


def print_curves(folder: Path, kind: str, title: str) -> None:
    """Print a row of scores by boundary for every task that has them."""
    rows = {}
    for file in sorted(folder.glob(f"*/tuned.{kind}.jsonl")):
        records = [record.fields for record in read_objects(str(file))]
        name = (
            f"{file.parent.name} {records[0]['metric']}" if kind == "boundary" else file.parent.name
        )
        rows[name] = {
            fields["boundary"]: cell(fields["score"], kind, best=bool(fields.get("best")))
            for fields in records
        }
    boundaries = sorted({boundary for row in rows.values() for boundary in row})
    print(f"{title}\n")
    print(f"| k | {' | '.join(map(str, boundaries))} |\n|---|{'---|' * len(boundaries)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(row.get(boundary, '–') for boundary in boundaries)} |")
    print()


def cell(score: float, kind: str, *, best: bool) -> str:
    """Return a score as text, the best in bold."""
    text = f"{score:.1f}" if kind == "boundary" else f"{score:.2f}"
    return f"**{text}**" if best else text


def print_tables(folder: Path) -> None:
    """Print every table that has scores."""
    tables: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in read_objects(str(folder / "scores.jsonl")):
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
