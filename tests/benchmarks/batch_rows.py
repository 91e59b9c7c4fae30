"""How many greedy outputs change with the batch they are decoded in, in two number formats.

Every record is decoded alone and in batches; the share of records whose text differs is counted.
In float32 lorakit promises none (tests/models/test_generation.py): the run ends with an error where
there are. In half precision, batches of another shape round differently, and how often that shows
depends on model and device; it is counted where the device is fast at bfloat16, or by --dtype.

    python -m tests.benchmarks.batch_rows [--model tiny] [--records 100] [--batch-size 32]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lorakit.models.loading import load_base
from lorakit.recipes.microworld.world import microworld
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings
from tests.benchmarks.machine import describe_machine, pick
from tests.benchmarks.program import main, option
from tests.benchmarks.result import BenchmarkError, Result


@dataclass(frozen=True)
class Options:
    model: str = option("tiny", "the model")
    records: int = option(100, "records to decode")
    batch_size: int = option(32, "rows at a time")
    max_new_tokens: int = option(32, "tokens that are written at most")
    device: str = option("auto", "where it computes")
    dtype: str = option("auto", "the number format besides float32; auto: the device's fast one")


SMOKE = Options(records=3, batch_size=3, max_new_tokens=4)


def measure(options: Options) -> Result:
    """Count the outputs that differ, in float32 and in the other number format."""
    device, dtype = pick(options.device, options.dtype)
    counts = {kind: differing(options, kind) for kind in dict.fromkeys((torch.float32, dtype))}
    if counts[torch.float32]:
        raise BenchmarkError(f"{counts[torch.float32]} outputs differ in float32")
    by_name = {str(kind).removeprefix("torch."): count for kind, count in counts.items()}
    return Result(
        name="batch_rows",
        unit=f"of the records differ in {str(dtype).removeprefix('torch.')}",
        ours=counts[dtype] / options.records,
        limit="none in float32",
        machine=describe_machine(device, dtype),
        details={"records": options.records, "records that differ": by_name},
    )


def differing(options: Options, dtype: torch.dtype) -> int:
    """Return the number of records whose output is another one in a batch than alone."""
    alone = outputs(replace(options, batch_size=1), dtype)
    together = outputs(options, dtype)
    return sum(text != other for text, other in zip(alone, together, strict=True))


def outputs(options: Options, dtype: torch.dtype) -> list[str]:
    """Return the model's outputs, decoded in batches."""
    from lorakit.models.generation import generate

    device, _ = pick(options.device, "float32")
    base = load_base(options.model, device=device, dtype=dtype)
    settings = GenerationSettings(
        batch_size=options.batch_size, max_new_tokens=options.max_new_tokens
    )
    rows = microworld("mention", split="test")
    records = [
        Record(row, str(row["id"])) for row, _ in zip(rows, range(options.records), strict=False)
    ]
    return [
        record.prediction
        for record, _ in generate(base, base.encoder(chat="auto"), records, settings)
    ]


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)
