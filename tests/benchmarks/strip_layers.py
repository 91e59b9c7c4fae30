"""How long `strip-layers` takes on a large adapter, and how much memory.

A float32 adapter of 32 layers is written to a temporary folder. The peer, which is also the limit,
is to read that file once and to write and sync as many bytes as are kept, in turns with the
command, whose time includes Python's start. Memory is the command's peak above that of stripping a
small adapter.

    python -m tests.benchmarks.strip_layers [--bytes 1e9] [--boundary 16] [--rounds 5]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import lora_name
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.tensors import Tensor
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.program import main, option
from tests.benchmarks.result import Result
from tests.benchmarks.rounds import in_turns, ratio_of

LAYERS, RANK, PIECE = 32, 64, 1 << 20


@dataclass(frozen=True)
class Options:
    bytes: float = option(1e9, "the adapter's size")
    boundary: int = option(LAYERS // 2, "the layers that keep their LoRA")
    rounds: int = option(5, "turns of each side")


SMOKE = Options(bytes=1e6, rounds=1)


def measure(options: Options) -> Result:
    """Strip a large adapter, and read and write it, in turns."""
    peaks: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        small, large, output = (
            Path(folder, f"{name}.safetensors") for name in ("small", "large", "out")
        )
        make_adapter(int(1e5), small)
        make_adapter(int(options.bytes), large)
        start = strip(small, output, options.boundary)
        peaks.append(strip(large, output, options.boundary))  # warms up, and says what is kept
        kept = output.stat().st_size
        ours, theirs = in_turns(
            lambda: seconds_of_strip(large, output, options.boundary, peaks),
            lambda: yardstick(large, output, kept),
            options.rounds,
        )
        size = large.stat().st_size
    ratio = ratio_of(ours, theirs)
    return Result(
        name="strip_layers",
        unit="s",
        ours=min(ours),
        peer=min(theirs),
        ratio=ratio.median,
        spread=ratio.spread,
        limit="reading the file and writing what is kept",
        limit_share=ratio.median,
        machine=describe_machine(torch.device("cpu"), torch.float32),
        details={
            "size of the adapter, MB": size / 1e6,
            "kept, MB": kept / 1e6,
            "peak above a small adapter's, MiB": (max(peaks) - start) / 1024,
            "size of a tensor, MiB": options.bytes / (LAYERS * 4) / 2**20,
        },
    )


def make_adapter(size: int, path: Path) -> None:
    """Write an adapter of about `size` bytes: two square projections a layer, all alike."""
    width = max(size // (LAYERS * 2 * 2 * RANK * 4), 1)
    values = np.random.default_rng(0).standard_normal((RANK, width), np.float32)
    a, b = Tensor.from_array(values), Tensor.from_array(values.T)
    tensors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for last in ("q_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{last}"
            tensors |= {lora_name(name, "A"): a, lora_name(name, "B"): b}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    save_adapter(Adapter(tensors, {**config, "target_modules": ["q_proj", "v_proj"]}), str(path))


def yardstick(source: Path, output: Path, kept: int) -> float:
    """Read the file once; write and sync `kept` bytes; return the seconds that took."""
    started, left = time.perf_counter(), kept
    with open(source, "rb", buffering=0) as reader, open(output, "wb") as writer:
        while piece := reader.read(PIECE):
            left -= writer.write(piece[:left])
        writer.flush()
        os.fsync(writer.fileno())
    return time.perf_counter() - started


def seconds_of_strip(source: Path, output: Path, boundary: int, peaks: list[int]) -> float:
    """Run the command, append its peak to `peaks`, and return the seconds it took."""
    started = time.perf_counter()
    peaks.append(strip(source, output, boundary))
    return time.perf_counter() - started


def strip(source: Path, output: Path, boundary: int) -> int:
    """Run the command; return its peak memory in KiB, or 0 where the system does not tell it."""
    command = [sys.executable, "-c", COMMAND, "strip-layers", str(source), "-q"]
    command += ["--boundary", str(boundary), "-o", str(output)]
    peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(peak or 0)


# The child reads its own VmHWM: the peak that resource.getrusage gives for a child includes that of
# its parent.
COMMAND = """
import pathlib
from lorakit.cli import lorakit
lorakit.main(standalone_mode=False)
status = pathlib.Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
print(*(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)
