"""Print the tables of paper1.sh and paper2.sh from the scores and searches that they have saved.

    python tables.py paper1 FOLDER
    python tables.py paper2 FOLDER

A score is the mean ± the standard deviation (n - 1) over seeds; p is that of paired approximate
randomization, over the test records of all seeds. What has no scores yet is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.commands._plots import plot_lines
from lorakit.records.jsonl import read_objects

USUAL_SIZE = 50  # training examples of a target
Fields = Mapping[str, Any]
SYSTEMS = {
    "zero-shot": "zero-shot",
    "xs": "LoRA (XS)",
    "wl": "LoRA (WL)",
    "far": "LoRA (FAR)",
    "tgt": "LoRA (TGT)",
    "tgt.budget": "LoRA (TGT), the merge's rank and budget",
    "lorahub.xs+wl": "LoRAHub (XS+WL)",
    "lorahub.xs+wl+tgt": "LoRAHub (XS+WL+TGT)",
    "learned": "learned weights (XS+WL+TGT)",
    "xs+wl.0": "Ours (XS+WL), no pruning",
    "xs+wl.chosen": "Ours (XS+WL), ratio chosen on validation",
    "xs+wl+tgt.0": "Ours (XS+WL+TGT), no pruning",
    "xs+wl+tgt.chosen": "Ours (XS+WL+TGT), ratio chosen on validation",
    "xs+wl+tgt.auto": "Ours (XS+WL+TGT), `auto`",
    "xs+wl+far+tgt.0": "Ours (XS+WL+FAR+TGT), no pruning",
    "xs+wl+tgt.0.3": "input, parameter, zero, within a matrix",
}
ADAPTERS = {
    "tuned": "fine-tuned, last epoch",
    "partial": "partial (bottom two thirds trained)",
    "tuned.ours": "ours: cut at the best boundary",
    "tuned.ours-loss": "ours: cut at the best boundary by loss",
    "tuned.ours-1se": "ours: cut by the rule 1se",
    "tuned.output": "as many layers by LoRA-drop's output",
    "tuned.importance": "as many layers by importance",
    "tuned-best": "fine-tuned, best epoch",
    "tuned-best.ours": "best epoch, cut",
    "tuned-best.ours-1se": "best epoch, cut by the rule 1se",
    "tuned-best.ours-loss": "best epoch, cut by loss",
    "rank32": "fine-tuned, rank 32",
    "rank32.ours": "rank 32, cut",
    "rank32.ours-1se": "rank 32, cut by the rule 1se",
    "rank32.ours-loss": "rank 32, cut by loss",
}


def read(path: Path) -> list[Fields]:
    """Return the objects of a file of JSON lines, none where the file is missing."""
    return [record.fields for record in read_objects(str(path))] if path.exists() else []


def name_of(fields: Fields) -> str:
    """Return the name of the system that a line of scores is about."""
    return str(fields.get("system") or Path(fields["file"]).stem)


def metrics_of(fields: Fields) -> list[str]:
    """Return the metrics of a line of scores."""
    return list(fields["signatures"])


def score_cell(fields: Fields, metric: str) -> str:
    """Return the mean and, over several seeds, the spread."""
    runs = fields.get("runs", {}).get(metric, [])
    spread = f" ± {statistics.stdev(runs):.1f}" if len(runs) > 1 else ""
    return f"{fields[metric]:.1f}{spread}"


def p_cell(fields: Fields, metric: str) -> str:
    """Return the p-value against the baseline, a dash for the baseline itself."""
    p = fields["significance"].get("p_values", {}).get(metric)
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"


def print_table(title: str, header: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    """Print a Markdown table under a title."""
    print(f"{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def print_scores(path: Path, title: str, names: Mapping[str, str], baseline: str) -> None:
    """Print the scores of a file, a row for each system, with p-values against the baseline."""
    lines = read(path)
    if not lines:
        return
    metrics = metrics_of(lines[0])
    tested = metrics[0]
    rows = (
        [
            names.get(name_of(line), name_of(line)),
            *(score_cell(line, metric) for metric in metrics),
            p_cell(line, tested),
        ]
        for line in lines
    )
    print_table(title, ["", *metrics, f"p against {baseline}"], rows)


def print_paper1(folder: Path) -> None:
    """Print Tables 2 and 4, the chosen ratios and the sizes of each target."""
    for target in sorted(path.parent for path in folder.glob("*/table2.scores.jsonl")):
        print_scores(target / "table2.scores.jsonl", f"{target.name}, Table 2", SYSTEMS, "TGT")
        print_scores(
            target / "pruning.scores.jsonl", f"{target.name}, pruning", SYSTEMS, "no pruning"
        )
        print_scores(
            target / "table4.scores.jsonl",
            f"{target.name}, Table 4 at a dose of 0.3",
            SYSTEMS,
            "no pruning",
        )
        print_choices(target)
        for size, path in sizes_of(target).items():
            print_scores(path, f"{target.name}, {size} training examples", SYSTEMS, "TGT")
        draw_sizes(target)


def sizes_of(target: Path) -> dict[int, Path]:
    """Return the files of scores by the number of training examples, but for the usual one."""
    paths = target.glob("size*.scores.jsonl")
    return dict(sorted((int(path.name.split(".")[0].removeprefix("size")), path) for path in paths))


def draw_sizes(target: Path) -> None:
    """Draw the scores by the number of training examples (Figure 6), where there are several."""
    paths = {**sizes_of(target), USUAL_SIZE: target / "table2.scores.jsonl"}
    rows = [
        {"training examples": size, "rougeL": line["rougeL"], "system": SYSTEMS[name_of(line)]}
        for size, path in paths.items()
        for line in read(path)
        if name_of(line) in ("tgt", "xs+wl+tgt.0")
    ]
    if len(paths) > 1:
        output = str(target / "figure6.svg")
        plot_lines(rows, x="training examples", y="rougeL", line="system", output=output)


def print_choices(target: Path) -> None:
    """Print the validation ROUGE-L of every ratio of every seed, the chosen one in bold."""
    for name in ("xs+wl", "xs+wl+tgt"):
        rows = {}
        for path in sorted(target.glob(f"*/{name}.chosen")):
            best, scores = path.read_text(encoding="utf-8").splitlines()
            rows[path.parent.name] = (best, json.loads(scores))
        if rows:
            ratios = list(next(iter(rows.values()))[1])
            print_table(
                f"{target.name}, validation ROUGE-L of {name.upper()} by ratio",
                ["seed", *ratios],
                (
                    [seed, *(bold(f"{scores[r]:.1f}", on=r == best) for r in ratios)]
                    for seed, (best, scores) in rows.items()
                ),
            )


def bold(text: str, *, on: bool) -> str:
    """Return a cell, in bold where `on`."""
    return f"**{text}**" if on else text


def print_paper2(folder: Path) -> None:
    """Print Tables 1, 6 and 7 and the curves of every task."""
    for task in sorted(path.parent for path in folder.glob("*/table1.scores.jsonl")):
        name = task.name
        print_scores(task / "table1.scores.jsonl", f"{name}, Table 1", ADAPTERS, "fine-tuned")
        print_scores(task / "table3.scores.jsonl", f"{name}, Table 3", ADAPTERS, "uncut")
        title = f"{name}, Table 1 over all seeds"
        print_scores(task / "seeds.scores.jsonl", title, ADAPTERS, "fine-tuned")
        print_scores(task / "best.scores.jsonl", f"{name}, the best epoch", ADAPTERS, "uncut")
        print_scores(task / "table6.scores.jsonl", f"{name}, Table 6", ADAPTERS, "uncut")
        for path in sorted(task.glob("table7.*.scores.jsonl")):
            other = path.name.split(".")[1]
            title = f"{name}, Table 7: the adapter of {other} and its boundary"
            print_scores(path, title, {}, "uncut")
        print_curves(task)


def print_curves(task: Path) -> None:
    """Print the score of every boundary in every search of a task, the chosen one in bold."""
    curves: dict[str, dict[int, Fields]] = {}
    for path in sorted(task.glob("*.jsonl")):
        if ".svg" in path.suffixes:
            continue
        for record in read(path):
            if {"boundary", "best"} <= record.keys():
                factor = f", λ = {record['factor']:g}" if "factor" in record else ""
                name = path.name.removesuffix(".jsonl") + factor
                curves.setdefault(name, {})[record["boundary"]] = record
    boundaries = sorted({boundary for curve in curves.values() for boundary in curve})
    if boundaries:
        print_table(
            f"{task.name}, by boundary",
            ["", *map(str, boundaries)],
            (
                [name, *(curve_cell(curve.get(k)) for k in boundaries)]
                for name, curve in curves.items()
            ),
        )


def curve_cell(record: Fields | None) -> str:
    """Return the score of a boundary, a dash where it was not tried."""
    if record is None:
        return "–"
    digits = 2 if record.get("metric", "loss") == "loss" else 1
    return bold(f"{record['score']:.{digits}f}", on=record["best"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paper", choices=["paper1", "paper2"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    {"paper1": print_paper1, "paper2": print_paper2}[options.paper](options.folder)


if __name__ == "__main__":
    main()
