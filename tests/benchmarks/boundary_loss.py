"""find-boundary --metric loss against the plain way: a forward pass for every boundary.

A random adapter on a model of SmolLM2-135M's shape (random weights, 30 layers), or on the model
that is named; the records are random tokens, or those of --data. Both sides read the same batches
in float32, boundary 0 too, in turns. The losses must agree, or the run ends with an error. The
limit is a program that runs each layer once for every loss that depends on it and no other: with L
layers L + L·(L+1)/2 of the plain way's (L+1)·L.

    python -m tests.benchmarks.boundary_loss [--model FOLDER] [--data FILE] [--records 2]
        [--prompt 160] [--completion 40] [--rounds 2]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorakit.boundary.cuts import Cut, bottom
from lorakit.boundary.gates import Gates
from lorakit.boundary.layerwise import Losses, layerwise_for, read_alone
from lorakit.boundary.loss import TOKENS_PER_ROW
from lorakit.models.base import Base
from lorakit.models.batches import micro_batches
from lorakit.models.loading import load_base
from lorakit.models.lora import attach
from lorakit.models.tokens import Example
from lorakit.records.jsonl import load_records
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.program import main, option
from tests.benchmarks.result import BenchmarkError, Result
from tests.benchmarks.rounds import Timed, in_turns, ratio_of, timed
from tests.benchmarks.shapes import SHAPES, random_adapter, random_base

Sums = dict[Cut, float]  # the losses by boundary, summed over the records
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    model: str = option(None, "a folder; without it the model is random", str)
    shape: str = option("smollm2", f"the random model's shape, of {', '.join(SHAPES)}")
    data: str = option(None, "records; without it rows of random tokens", str)
    records: int = option(2, "records to read")
    prompt: int = option(160, "tokens of a random prompt")
    completion: int = option(40, "tokens of a random completion")
    rounds: int = option(2, "turns of each side")


SMOKE = Options(shape="small", records=1, prompt=16, completion=4, rounds=1)


def measure(options: Options) -> Result:
    """Read by both sides in turns, and compare times and losses."""
    base = base_of(options)
    examples = examples_of(options, base)
    first = examples[0]
    warm_up = Example(first.ids[:8], 4, first.where)
    both_sides(base, [warm_up], 1)
    ours, theirs = both_sides(base, examples, options.rounds)
    expected = theirs[0].output
    farthest = max(abs(ours[0].output[cut] - loss) / loss for cut, loss in expected.items())
    if farthest > 1e-5:
        raise BenchmarkError(f"a loss differs by {farthest:.1e} of it")
    if len({f"{loss:.4e}" for loss in expected.values()}) == 1:
        raise BenchmarkError("the boundaries do not differ")
    ratio = ratio_of([r.processor for r in ours], [r.processor for r in theirs])
    best = 2 * (base.layers + 1) / (base.layers + 3)
    return Result(
        name="boundary_loss",
        unit="s of the processor",
        ours=min(r.processor for r in ours),
        peer=min(r.processor for r in theirs),
        ratio=ratio.median,
        spread=ratio.spread,
        limit=f"{best:.2f}×, each layer run once for every loss that depends on it",
        limit_share=ratio.median / best,
        machine=describe_machine(base.device, base.dtype),
        details={
            "boundaries": len(expected),
            "records": len(examples),
            "largest relative difference of a loss": farthest,
        },
    )


def base_of(options: Options) -> Base:
    """Return the model of the options, in float32 on the CPU."""
    if options.model:
        return load_base(options.model, device=CPU, dtype=torch.float32)
    return random_base(SHAPES[options.shape], CPU, torch.float32)


def examples_of(options: Options, base: Base) -> list[Example]:
    """Return the first records of --data as the model reads them, or rows of random tokens."""
    if not options.data:
        return random_examples(options, len(base.model.get_input_embeddings().weight))
    encoder = base.encoder(chat="auto")
    records, _ = load_records(options.data, "prompt", "completion")
    return [encoder.example(record) for record in records[: options.records]]


def random_examples(options: Options, words: int) -> list[Example]:
    """Return rows of random tokens whose parts differ by up to a quarter from the lengths."""
    draw = random.Random(0)

    def about(length: int) -> int:
        return draw.randint(length - length // 4, length + length // 4)

    examples = []
    for number in range(options.records):
        start, targets = about(options.prompt), about(options.completion)
        ids = tuple(draw.randrange(3, min(4000, words)) for _ in range(start + targets))
        examples.append(Example(ids, start, f"random:{number}"))
    return examples


def both_sides(
    base: Base, examples: Sequence[Example], rounds: int
) -> tuple[list[Timed[Sums]], list[Timed[Sums]]]:
    """Return every round of each side, ours first; ours includes its trial of the model."""
    cuts = [bottom(k, base.layers) for k in range(base.layers, -1, -1)]
    batches = micro_batches(examples, TOKENS_PER_ROW * 16)
    with Gates(attach(base, random_adapter(base))).standing() as gates:

        def together() -> list[Losses]:
            reader = layerwise_for(base, gates, examples, cuts)
            if reader is None:
                raise BenchmarkError("the model cannot be read layer by layer")
            return [losses for rows in batches for losses in reader.read(rows, cuts)]

        def apart() -> list[Losses]:
            return [losses for rows in batches for losses in read_alone(base, gates, rows, cuts)]

        return in_turns(
            lambda: timed(lambda: summed(together), CPU),
            lambda: timed(lambda: summed(apart), CPU),
            rounds,
        )


def summed(work: Callable[[], list[Losses]]) -> Sums:
    """Return the losses of each cut, summed over the records."""
    sums: Sums = {}
    for cut, part in work():
        sums[cut] = sums.get(cut, 0.0) + float(part.sum())
    return sums


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)
