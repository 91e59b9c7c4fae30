"""Print the boundary with the best score of find-boundary's records, or the one marked there.

    python boundary_of.py boundaries.jsonl [--rule 1se]

The records are of a search with `--rule 1se`, which marks the smallest boundary within one standard
error of the best score; so both can be read from one search.
"""

from __future__ import annotations

import argparse

from lorakit.records.jsonl import read_objects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records")
    parser.add_argument("--rule", choices=["best", "1se"], default="best")
    options = parser.parse_args()
    records = [record.fields for record in read_objects(options.records)]
    if options.rule == "1se":
        (boundary,) = (record["boundary"] for record in records if record["best"])
    else:
        sign = -1 if records[0]["metric"] == "loss" else 1
        highest = max(records, key=lambda record: (sign * record["score"], -record["boundary"]))
        boundary = highest["boundary"]
    print(boundary)


if __name__ == "__main__":
    main()
