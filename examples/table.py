"""Print a table of mean and spread over seeds from the scores of examples/adaptive_merge.sh.

    python examples/table.py runs/scores.jsonl [--metric rougeL]

A line of scores names its file, …/LANG/TASK/SYSTEM.jsonl or …/LANG/TASK/SEED/SYSTEM.jsonl; a system
without seeds has one number, the others mean ± standard deviation (n - 1) over their seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import PurePath

from lorakit.records import read_objects

SYSTEMS = {
    "zero-shot": "Zero-shot",
    "xs": "LoRA (XS)",
    "wl": "LoRA (WL)",
    "tgt": "LoRA (TGT)",
    "xs+wl": "Merged (XS+WL)",
    "xs+wl.pruned": "Merged (XS+WL), pruned",
    "xs+wl+tgt": "Merged (XS+WL+TGT)",
    "xs+wl+tgt.pruned": "Merged (XS+WL+TGT), pruned",
}


def read_scores(path: str, metric: str) -> dict[tuple[str, str], list[float]]:
    """Return the values of a metric by (task, system); task is `TASK LANG`."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in read_objects(path):
        parts = PurePath(record.fields["file"]).with_suffix("").parts
        lang, task = (parts[-4], parts[-3]) if parts[-2].isdecimal() else (parts[-3], parts[-2])
        values[f"{task} {lang}", parts[-1]].append(record.fields[metric])
    return values


def cell(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores")
    parser.add_argument("--metric", default="rougeL")
    given = parser.parse_args()
    values = read_scores(given.scores, given.metric)
    tasks = sorted({task for task, _ in values}, key=lambda task: task.split()[::-1])
    print(f"| {given.metric} | {' | '.join(tasks)} |")
    print(f"|---|{'---|' * len(tasks)}")
    for system, name in SYSTEMS.items():
        cells = [cell(values[task, system]) if values[task, system] else "–" for task in tasks]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
