"""How many greedy outputs change with the batch they are decoded in, in float32 and in bfloat16.

    python tests/benchmarks/batch_rows.py [--model tiny] [--records 200] [--batch-size 32]

Every record is decoded alone and in batches; the share of records whose text differs is printed.
In float32 lorakit promises none (tests/models/test_generation.py); in half precision, batches of
another shape round differently, and how often that shows depends on model and device.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from lorakit.models.devices import pick_device
from lorakit.models.generation import generate
from lorakit.models.loading import load_base
from lorakit.recipes.microworld.world import microworld
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings


def outputs(model: str, dtype: torch.dtype, count: int, batch_size: int) -> list[str]:
    """Return the model's outputs on `count` records, decoded in batches of this size."""
    base = load_base(model, device=pick_device("auto"), dtype=dtype)
    settings = replace(GenerationSettings(), batch_size=batch_size, max_new_tokens=32)
    rows = microworld("mention", split="test")
    records = [Record(row, str(row["id"])) for row, _ in zip(rows, range(count), strict=False)]
    written = generate(base, base.encoder(chat="auto"), records, settings)
    return [record.prediction for record, _ in written]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        alone = outputs(options.model, dtype, options.records, 1)
        together = outputs(options.model, dtype, options.records, options.batch_size)
        differing = sum(text != other for text, other in zip(alone, together, strict=True))
        print(f"{str(dtype).removeprefix('torch.')}: {differing} of {len(alone)} records differ")


if __name__ == "__main__":
    main()
