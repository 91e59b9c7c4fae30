"""Print how well `--prune-ratio auto` searched, from what auto_search.sh has left.

    python examples/auto_search.py runs/en --tasks title impression highlights --seeds 0 1 2

By task and seed: the ratio that is best in the grid and the one that the search chose; Spearman's
rank correlation of the search's order with the grid's, over the ratios above 0 and over all that
the search tried (0, which no rival can stop, then stands among those that were not stopped); the
regret, which is the validation loss in the grid of the ratio chosen minus that of the best, and the
same of no pruning; the p-value of the search's verdict; the cost in merges. The search's order is
by how far it let a ratio go, then by the loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from lorakit.adapters.storage import load_adapter


def search_of(path: Path) -> dict[str, Any]:
    """Return what an adapter's header says of the search that it came from."""
    return load_adapter(str(path)).header["history"][-1]["search"]


def place_in_order(trial: dict[str, Any]) -> tuple[int, float]:
    """Return the key that sorts trials as the search does: those it let go on before the others."""
    return (-trial["steps"] if trial["stopped"] else -sys.maxsize, trial["loss"])


def correlation(order: Sequence[float], losses: Mapping[float, float]) -> float:
    """Return Spearman's rank correlation of an order of ratios, best first, with their losses."""
    return float(spearmanr(range(len(order)), [losses[ratio] for ratio in order]).statistic)


def compare(folder: Path) -> dict[str, Any]:
    """Return the comparison of the search in a folder with the grid there."""
    grid, auto = (search_of(folder / f"{name}.safetensors") for name in ("grid", "auto"))
    losses = {trial["prune_ratio"]: trial["loss"] for trial in grid["tried"]}
    tried = sorted(auto["tried"], key=place_in_order)
    order = [trial["prune_ratio"] for trial in tried]
    chosen = next(trial["prune_ratio"] for trial in tried if trial["best"])
    best = min(losses, key=lambda ratio: losses[ratio])
    merge = next(trial["steps"] for trial in tried if trial["prune_ratio"] == 0)
    return {
        "best": best,
        "chosen": chosen,
        "correlation": correlation([ratio for ratio in order if ratio], losses),
        "correlation_of_all": correlation(order, losses),
        "regret": losses[chosen] - losses[best],
        "regret_of_none": losses[0] - losses[best],
        "p": (auto.get("test") or {}).get("p_value", 1.0),
        "cost": sum(trial["steps"] for trial in tried) / merge,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", required=True)
    options = parser.parse_args()
    print(
        "| task, seed | grid's best | chosen | rank correlation | with 0 | regret "
        "| of no pruning | p | merges |"
    )
    print(f"|{'---|' * 9}")
    rows = []
    for task in options.tasks:
        for seed in options.seeds:
            row = compare(options.folder / task / seed)
            rows.append(row)
            print(f"| {task}, {seed} | {row['best']} | {row['chosen']} | {numbers(row)} |")
    means = {name: fmean(row[name] for row in rows) for name in rows[0] if name != "p"}
    print(f"| mean | | | {numbers(means)} |")


def numbers(row: Mapping[str, float]) -> str:
    """Return the cells of a row from the rank correlation on."""
    p = f"{row['p']:.3f}" if "p" in row else ""
    return (
        f"{row['correlation']:.2f} | {row['correlation_of_all']:.2f} | {row['regret']:.4f} "
        f"| {row['regret_of_none']:.4f} | {p} | {row['cost']:.2f}"
    )


if __name__ == "__main__":
    main()
