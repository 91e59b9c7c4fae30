"""Run the benchmarks, each in a process of its own, and write a line of JSON for each result.

    python -m tests.benchmarks [NAME …] [--out FILE] [--smoke]

The lines go to stdout, or to --out; what is to be read goes to stderr. All take less than 15
minutes on two idle cores. What cannot be measured here is a line too, and the others go on. The
cost on a GPU and how cost grows are measured by `python -m tests.benchmarks.gpu` and `growth`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO

from tests.benchmarks.side import ROOT

# What each compares. To add a benchmark, write its module (program.py says how) and add a line.
BENCHMARKS: dict[str, str] = {
    "train_step": "a merge step against PEFT's three active adapters",
    "generate": "generate against transformers' own loop",
    "find_boundary": "find-boundary against PEFT's generate at every boundary",
    "boundary_loss": "find-boundary --metric loss against a pass for every boundary",
    "static_merge": "merge --method svd against PEFT's add_weighted_adapter",
    "fuse": "fuse against PEFT's merge_and_unload",
    "score": "score with intervals and p-values against sacrebleu's command",
    "start_up": "--help, inspect and a first step against the same by hand",
    "strip_layers": "strip-layers against reading and writing the file",
    "batch_rows": "outputs that change with the batch they are decoded in",
    "checkpointing": "a training step with and without gradient checkpointing",
    "load_memory": "memory while a base is loaded against its checkpoint's size",
}


def run(name: str, *, smoke: bool) -> list[dict[str, object]]:
    """Return the records of one benchmark: its results, or the error that it ended with."""
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--json"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, *(["--smoke"] if smoke else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    took = round(time.perf_counter() - started, 1)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return [{"name": name, "error": lines[-1].removeprefix("Error: "), "took": took}]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [{**json.loads(line), "took": took} for line in lines]


def shown(record: dict[str, object]) -> str:
    """Return a record as one line to read."""
    if "error" in record:
        return f"{record['name']}: {record['error']}"
    ratio = "" if record["ratio"] is None else f", {record['ratio']:.2f}× the peer"
    share = record["limit_share"]
    limit = "" if share is None else f", {100 * float(str(share)):.0f} % of {record['limit']}"
    return f"{record['name']}: {record['ours']:.3g} {record['unit']}{ratio}{limit}"


@contextlib.contextmanager
def opened(path: str | None) -> Iterator[IO[str]]:
    """Open the file that lines are written to; stdout without one."""
    if path is None:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8") as stream:
        yield stream


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that are named, or all; return 1 if one has no result."""
    listed = "\n".join(f"  {name:14} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=f"Run benchmarks and write a line of JSON for each.\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *BENCHMARKS])
    parser.add_argument("--out", help="the file that lines of JSON are written to")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, to try the code")
    options = parser.parse_args(arguments)
    failed = 0
    with opened(options.out) as stream:
        for name in options.names or BENCHMARKS:
            for record in run(name, smoke=options.smoke):
                failed += "error" in record
                print(json.dumps(record, ensure_ascii=False), file=stream, flush=True)
                print(f"{shown(record)}  [{record['took']} s]", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
