"""What lorakit costs on one GPU, against PEFT and transformers in the same process.

Seven parts, each in a process of its own with a budget of seconds, ten minutes together; a part
that fails, or for which memory or time does not suffice, is a line, and the others go on:

- `parity`: in float32 on small shapes, both sides of all that follows give the same;
- `merge-512`, `merge-2048`: a step of three rank-8 adapters on a random Llama-3-8B in bfloat16,
  made on the device, in batches of 4,096 tokens, against PEFT's three active adapters;
- `train`: the same with one adapter, as train-adapter does it;
- `generate`: 256 prompts × 128 tokens on the same base, against transformers' generate;
- `boundary`: find-boundary of a 32-layer model of a billion parameters, against the loop;
- `tests`: the tests marked `gpu`.

    python -m tests.benchmarks.gpu [PART …] [--out FILE] [--smoke] [--device cuda]

`--smoke` runs the same code on the CPU with small shapes. Lines of JSON go to stdout or --out, a
table to stderr. The goals: a merge step at 1.8× PEFT's tokens/s or more and 0.6× its memory or
less, and at 45 % of the card's matrix rate.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks import gpu_parts
from tests.benchmarks.__main__ import opened
from tests.benchmarks.result import BenchmarkError
from tests.benchmarks.side import in_process

PartFunction = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """What a part runs, its budget in seconds, and the arguments that make it this part."""

    run: PartFunction
    seconds: float
    arguments: dict[str, object]


PARTS: dict[str, Part] = {
    "parity": Part(gpu_parts.parity, 50, {}),
    "merge-512": Part(gpu_parts.merge_steps, 90, {"length": 512, "rows": 8, "adapters": 3}),
    "merge-2048": Part(gpu_parts.merge_steps, 90, {"length": 2048, "rows": 2, "adapters": 3}),
    "train": Part(gpu_parts.merge_steps, 70, {"length": 512, "rows": 8, "adapters": 1}),
    "generate": Part(gpu_parts.generation, 90, {"prompts": 256, "new": 128}),
    "boundary": Part(gpu_parts.boundary, 110, {"prompts": 16, "new": 32}),
    "tests": Part(gpu_parts.marked_tests, 100, {}),
}
COLUMNS = ("part", "ours", "peer", "ratio", "memory", "of the limit")


def run(name: str, device: str, *, smoke: bool) -> dict[str, object]:
    """Return the record of a part: what it measured, or why it could not."""
    part, started = PARTS[name], time.perf_counter()
    record: dict[str, object]
    try:
        (record,) = in_process(
            part.run,
            {"device": device, "smoke": smoke, **part.arguments},
            limit=part.seconds * (20 if smoke else 1),  # a smoke run may share its machine
        )
    except BenchmarkError as error:
        record = {"error": str(error)}
    return {"part": name, **record, "took": round(time.perf_counter() - started, 1)}


def row_of(record: dict[str, Any]) -> list[str]:
    """Return a record as a row of the table, by COLUMNS."""
    if "error" in record:
        return [record["part"], f"error: {record['error']}"[:90]]
    share, details = record.get("limit_share"), record.get("details", {})
    memory = details.get("memory, of the peer's")
    return [
        record["part"],
        f"{record['ours']:.4g} {record['unit']}",
        "" if record.get("peer") is None else f"{record['peer']:.4g}",
        "" if record.get("ratio") is None else f"{record['ratio']:.2f}×",
        "" if memory is None else f"{memory:.2f}×",
        "" if share is None else f"{100 * share:.0f} %",
    ]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the parts as lines of columns."""
    rows = [list(COLUMNS), *map(row_of, records)]
    whole = [row for row in rows if len(row) == len(COLUMNS)]
    widths = [max(len(row[place]) for row in whole) for place in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=False)
        lines.append("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are named, or all; return 1 if one has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu")
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[[], *PARTS])
    parser.add_argument("--out", help="the file that lines of JSON are written to")
    parser.add_argument("--device", help="default: cuda, or cpu with --smoke")
    parser.add_argument("--smoke", action="store_true", help="small shapes, to try the code")
    options = parser.parse_args(arguments)
    device, records = options.device or ("cpu" if options.smoke else "cuda"), []
    with opened(options.out) as stream:
        for name in options.parts or PARTS:
            record = run(name, device, smoke=options.smoke)
            records.append(record)
            print(json.dumps(record, ensure_ascii=False), file=stream, flush=True)
            print(f"{name}: {record['took']} s", file=sys.stderr, flush=True)
    print(table(records), file=sys.stderr)
    return 1 if any("error" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
