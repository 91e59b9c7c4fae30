"""Peak host memory while a base is loaded, against the size of its checkpoint.

A random Llama is written in bfloat16 and loaded on the CPU, each way in a process of its own: in
the checkpoint's dtype, in float32, in 8 and 4 bits (bitsandbytes), and in two shards, for which the
larger of the two processes counts. `own` is the peak of what the process itself holds, above what
it held before; `mapped` that of the pages of the checkpoint's files in memory, which all processes
of a machine share and which the system takes back when it needs them; `after` is what is held in
the end. All are in multiples of the checkpoint's size, which is also the limit: `ours` is the peak
of both, while the base is loaded in float32, twice the checkpoint's size.

    python -m tests.benchmarks.load_memory [--width 1024] [--layers 12] [--ways 'float32;4bit']
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lorakit.models.loading import load_base
from lorakit.models.sharing import new_accelerator
from lorakit.runs.processes import process_count
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.program import main, option
from tests.benchmarks.result import BenchmarkError, Result
from tests.benchmarks.rounds import status
from tests.benchmarks.shapes import Shape
from tests.benchmarks.side import in_process
from tests.support.models import byte_tokenizer

WORDS = 32_000
WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
    "8bit": {"dtype": torch.bfloat16, "load_in": "8bit"},
    "4bit": {"dtype": torch.bfloat16, "load_in": "4bit"},
    "bfloat16, 2 shards": {"dtype": torch.bfloat16, "shard": True},
    "float32, 2 shards": {"dtype": torch.float32, "shard": True},
}
USUAL = ("bfloat16", "float32", "8bit", "float32, 2 shards")  # the ways that tell most
KINDS = {"own": "RssAnon", "mapped": "RssFile"}


@dataclass(frozen=True)
class Options:
    width: int = option(1024, "the model's width, a multiple of 64")
    layers: int = option(12, "its layers")
    ways: str = option(";".join(USUAL), f"ways to load it, by semicolons, of {'; '.join(WAYS)}")


SMOKE = Options(width=64, layers=2, ways="bfloat16;float32")


def measure(options: Options) -> Result:
    """Load a base in every way, and compare the peaks with its checkpoint's size."""
    ways = options.ways.split(";")
    if "float32" not in ways:
        raise BenchmarkError("the peak in float32 is the result; add float32 to --ways")
    with tempfile.TemporaryDirectory() as folder:
        size = save_in_bfloat16(Path(folder), options.width, options.layers)
        found = {way: measured(folder, way) for way in ways}
    shares = {
        way: {kind: round(value / size, 3) for kind, value in sizes.items()}
        for way, sizes in found.items()
    }
    return Result(
        name="load_memory",
        unit="× the checkpoint's size, the peak in float32",
        ours=found["float32"]["own"] / size,
        limit="2×, its weights in float32",
        limit_share=2 * size / found["float32"]["own"],
        machine=describe_machine(torch.device("cpu"), torch.bfloat16),
        details={"checkpoint, MB": size / 1e6, **shares},
    )


def save_in_bfloat16(folder: Path, width: int, layers: int) -> int:
    """Write a random Llama in bfloat16 and a byte tokenizer; return the size of its weights."""
    torch.manual_seed(0)
    shape = Shape(WORDS, width, width * 43 // 16, layers, width // 64, width // 64, 4096)
    model: Any = transformers.LlamaForCausalLM(shape.config)
    model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    byte_tokenizer().save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured(folder: str, way: str) -> dict[str, int]:
    """Return what the processes that load the base in one way have measured, the largest of each.

    The processes of shards are started by torchrun.
    """
    os.environ["ACCELERATE_USE_CPU"] = "true"
    shards = 2 if "shard" in WAYS[way] else 1
    found = in_process(peaks_of, {"folder": folder, "way": way}, processes=shards)
    return {kind: max(sizes[kind] for sizes in found) for kind in found[0]}


def peaks_of(folder: str, way: str) -> dict[str, int]:
    """Load the base in one way; return the peaks, and what is held in the end, in bytes."""
    if process_count() > 1:
        new_accelerator("cpu")
    before = held()
    peaks = dict(before)
    with watching(peaks):
        base = load_base(folder, device=torch.device("cpu"), **WAYS[way])
    after = held()
    sizes = {kind: peaks[kind] - before[kind] for kind in KINDS}
    del base
    return {**sizes, "after": after["own"] - before["own"]}


def held() -> dict[str, int]:
    """Return what this process holds, in bytes, by the names of KINDS."""
    return {kind: status(name) for kind, name in KINDS.items()}


@contextmanager
def watching(peaks: dict[str, int]) -> Iterator[None]:
    """Inside the block, raise `peaks` to what is held, looked up every two milliseconds."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for kind, size in held().items():
                peaks[kind] = max(peaks[kind], size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)
