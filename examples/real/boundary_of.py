"""Print the boundary with the best score of find-boundary's records, or that of another rule.

    python boundary_of.py boundaries.jsonl [--rule 1se]

The rule 1se takes the smallest boundary within one standard error of the best score. Both are read
from one search, whichever rule it was made with.
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
    sign = -1 if records[0]["metric"] == "loss" else 1
    highest = max(sign * record["score"] for record in records)
    near = [
        record["boundary"]
        for record in records
        if highest - sign * record["score"]
        <= (record["standard_error"] if options.rule == "1se" else 0)
    ]
    print(min(near))


if __name__ == "__main__":
    main()
