"""How time and memory grow with what a user chooses: a table, and what is steeper than it must be.

For each kind of work and each size, the work is done at several values of that size while the
others stay as they are. The exponent is the slope of log cost against log size over the upper half
of the values, where what every run costs weighs least; `must` is that of the plainest program that
does the work. A slope more than 0.3 above it is flagged. Time is the processor's, the least of the
rounds; memory is the peak above what was held before.

    python -m tests.benchmarks.growth [WORK …] [--out FILE] [--rounds 2] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from tests.benchmarks.__main__ import opened
from tests.benchmarks.growth_works import SIZES, WORKS, Sizes, Work
from tests.benchmarks.rounds import Timed, timed

CPU = torch.device("cpu")
TOLERANCE = 0.3  # that a measured exponent may lie above the one that must be
LEAST_MEMORY = 10.0  # MB: the slope of less is the allocator's
LEAST_SECONDS = 0.05  # the slope of less is the clock's


@dataclass(frozen=True)
class Curve:
    """The cost of a work at the values of one size: seconds of the processor, and MB."""

    work: str
    size: str
    must: float
    why: str
    values: tuple[int, ...]
    seconds: tuple[float, ...]
    megabytes: tuple[float, ...]

    @property
    def time_exponent(self) -> float:
        return exponent(self.values, self.seconds)

    @property
    def memory_exponent(self) -> float | None:
        """None where memory is too little to tell."""
        if max(self.megabytes) < LEAST_MEMORY or min(self.megabytes) <= 0:
            return None
        return exponent(self.values, self.megabytes)

    @property
    def is_steep(self) -> bool:
        of_time = self.time_exponent if max(self.seconds) >= LEAST_SECONDS else 0.0
        return max(of_time, self.memory_exponent or 0.0) > self.must + TOLERANCE

    def as_json(self) -> str:
        fields = {"time exponent": self.time_exponent, "memory exponent": self.memory_exponent}
        return json.dumps({**asdict(self), **fields, "steep": self.is_steep}, ensure_ascii=False)


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Return the least-squares slope of log cost against log value, over the upper half."""
    first = min(len(values) // 2, len(values) - 2)
    xs = [math.log(value) for value in values[first:]]
    ys = [math.log(max(cost, 1e-9)) for cost in costs[first:]]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return above / sum((a - x) ** 2 for a in xs)


def measure(name: str, work: Work, size: str, *, rounds: int, smoke: bool) -> Curve:
    """Return the curve of a work over the values of a size."""
    growth = work.growth[size]
    values = growth.smoke_values if smoke else growth.values
    start = work.smoke if smoke else work.sizes
    costs = [cost_of(work, replace(start, **{size: value}), rounds) for value in values]
    return Curve(
        name,
        size,
        growth.must,
        growth.why,
        values,
        tuple(round(cost.processor, 4) for cost in costs),
        tuple(round(cost.memory, 2) for cost in costs),
    )


def cost_of(work: Work, sizes: Sizes, rounds: int) -> Timed[None]:
    """Return the cheapest of the rounds, after the first one, which warms up."""
    run = work.prepare(sizes)
    turns = [timed(run, CPU) for _ in range(rounds + 1)]
    return min(turns[1:], key=lambda turn: turn.processor)._replace(
        memory=max(turn.memory for turn in turns)
    )


def row(curve: Curve) -> str:
    """Return a curve as a line of the table."""
    memory = curve.memory_exponent
    cells = [
        f"{curve.work:14}{curve.size:11}",
        f"{curve.values[0]}-{curve.values[-1]}".rjust(12),
        f"{curve.seconds[0]:9.3f} {curve.seconds[-1]:9.3f} s",
        f"{curve.megabytes[0]:8.1f} {curve.megabytes[-1]:8.1f} MB",
        f"  time ^{curve.time_exponent:.2f}",
        f"  memory ^{memory:.2f}" if memory is not None else "  memory -    ",
        f"  must ^{curve.must:g}",
        "  STEEP" if curve.is_steep else "",
    ]
    return "".join(cells).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of the works that are named, or of all; return 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth")
    parser.add_argument("works", nargs="*", metavar="WORK", choices=[[], *WORKS])
    parser.add_argument("--size", choices=SIZES, help="only this size")
    parser.add_argument("--out", help="the file that lines of JSON are written to")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="few small values, to try the code")
    options = parser.parse_args(arguments)
    with opened(options.out) as stream:
        for name in options.works or WORKS:
            for size in [size for size in WORKS[name].growth if options.size in (None, size)]:
                curve = measure(
                    name,
                    WORKS[name],
                    size,
                    rounds=1 if options.smoke else options.rounds,
                    smoke=options.smoke,
                )
                print(curve.as_json(), file=stream, flush=True)
                print(row(curve), file=sys.stderr, flush=True)
                if curve.is_steep or curve.why:
                    print(f"    {curve.why or 'unexplained'}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
