"""Draw the searches over pruning ratios of several seeds as one figure.

    python examples/overlay.py ratios.svg "seed 0=0/grid.svg.jsonl" "seed 1=1/grid.svg.jsonl"

Each file is the data that `lorakit merge … --plot` writes beside its picture. Bars are 95 %
intervals over the validation records, a star is the best of a search.
"""

from __future__ import annotations

import argparse

from lorakit.commands._plots import plot_searches
from lorakit.records.jsonl import read_objects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", help="a .png or .svg file")
    parser.add_argument("searches", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--metric", default="loss", help="what decided between the ratios")
    options = parser.parse_args()
    pairs = [text.rpartition("=") for text in options.searches]
    searches = {
        name or path: [record.fields for record in read_objects(path)] for name, _, path in pairs
    }
    plot_searches(searches, metric=options.metric, output=options.figure)


if __name__ == "__main__":
    main()
