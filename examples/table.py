"""Print a table of the adaptive-merge paper from the scores that adaptive_merge.sh has saved.

    python examples/table.py runs [--table 2] [--metric rougeL]

The scores are in FOLDER/LANG/TASK/table2.scores.jsonl and table4.scores.jsonl. A system with seeds
has mean ± standard deviation (n - 1) over them; a star means p < 0.05 against the table's baseline.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from lorakit.records.jsonl import read_objects
from lorakit.records.record import Record

TABLES = {
    2: {
        "zero-shot": "Zero-shot",
        "xs": "LoRA (XS)",
        "wl": "LoRA (WL)",
        "tgt": "LoRA (TGT)",
        "lorahub.xs+wl": "LoRAHub (XS+WL)",
        "lorahub.xs+wl+tgt": "LoRAHub (XS+WL+TGT)",
        "xs+wl": "Ours (XS+WL), no pruning",
        "xs+wl.pruned": "Ours (XS+WL)",
        "xs+wl+tgt": "Ours (XS+WL+TGT), no pruning",
        "xs+wl+tgt.pruned": "Ours (XS+WL+TGT)",
    },
    4: {
        "xs+wl+tgt": "no pruning",
        "input-module-zero": "input, module, zero",
        "input-module-init": "input, module, init",
        "gradient-module-zero": "gradient, module, zero",
        "gradient-module-init": "gradient, module, init",
        "xs+wl+tgt.pruned": "input, parameter, zero",
        "input-parameter-init": "input, parameter, init",
        "gradient-parameter-zero": "gradient, parameter, zero",
        "gradient-parameter-init": "gradient, parameter, init",
    },
}


def read_scores(folder: Path, table: int) -> dict[tuple[str, str], Record]:
    """Return the records of scores by task, as `TASK LANG`, and system."""
    scores = {}
    for path in sorted(folder.glob(f"*/*/table{table}.scores.jsonl")):
        lang, task = path.parts[-3:-1]
        for record in read_objects(str(path)):
            name = record.fields.get("system") or Path(record.fields["file"]).stem
            scores[f"{task} {lang}", name] = record
    return scores


def cell(record: Record, metric: str) -> str:
    """Return a table's cell: the mean, the spread over seeds and the star of significance."""
    fields = record.fields
    runs = fields.get("runs", {}).get(metric, [])
    spread = f" ± {statistics.stdev(runs):.1f}" if len(runs) > 1 else ""
    p = fields["significance"].get("p_values", {}).get(metric, 1.0)
    return f"{fields[metric]:.1f}{spread}{'*' if p < 0.05 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", type=int, choices=sorted(TABLES), default=2)
    parser.add_argument("--metric", default="rougeL")
    options = parser.parse_args()
    scores = read_scores(options.folder, options.table)
    tasks = sorted({task for task, _ in scores}, key=lambda task: task.split()[::-1])
    print(f"| {options.metric} | {' | '.join(tasks)} |")
    print(f"|---|{'---|' * len(tasks)}")
    for system, name in TABLES[options.table].items():
        cells = [
            cell(scores[task, system], options.metric) if (task, system) in scores else "–"
            for task in tasks
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
