"""Print and draw scores by the size of the training set, from what data_size.sh has saved.

    python examples/data_size.py runs/data_size.jsonl [--metric rougeL] [--plot FILE.png]

A line's system is named SIZE:SYSTEM.
"""

from __future__ import annotations

import argparse

from lorakit.commands._plots import plot_lines
from lorakit.records.jsonl import read_objects

SYSTEMS = {"tgt": "LoRA (TGT)", "xs+wl": "Ours (XS+WL)", "xs+wl+tgt": "Ours (XS+WL+TGT)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores")
    parser.add_argument("--metric", default="rougeL")
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    rows = []
    for record in read_objects(options.scores):
        size, system = record.fields["system"].split(":")
        value = record.fields[options.metric]
        rows.append({"system": SYSTEMS[system], "examples": int(size), options.metric: value})
    sizes = sorted({row["examples"] for row in rows})
    print(f"| {options.metric} by training examples | {' | '.join(map(str, sizes))} |")
    print(f"|---|{'---|' * len(sizes)}")
    for name in SYSTEMS.values():
        scores = {row["examples"]: row[options.metric] for row in rows if row["system"] == name}
        print(f"| {name} | {' | '.join(f'{scores[size]:.1f}' for size in sizes)} |")
    if options.plot:
        plot_lines(rows, x="examples", y=options.metric, line="system", output=options.plot)


if __name__ == "__main__":
    main()
