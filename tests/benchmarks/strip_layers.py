"""How long `strip-layers` takes on a large adapter, and how much memory.

    python tests/benchmarks/strip_layers.py [--bytes 1e9] [--boundary 16] [--runs 5]

A float32 adapter of 32 layers is written to a temporary folder. The yardstick is to read that file
once and to write and sync as many bytes as are kept, in turns with the command, whose time includes
Python's start. Memory is the command's peak above that of stripping a small adapter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import lora_name
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.tensors import Tensor

LAYERS, RANK, PIECE = 32, 64, 1 << 20


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


def yardstick(source: Path, output: Path, kept: int) -> None:
    """Read the file once; write and sync `kept` bytes."""
    left = kept
    with open(source, "rb", buffering=0) as reader, open(output, "wb") as writer:
        while piece := reader.read(PIECE):
            left -= writer.write(piece[:left])
        writer.flush()
        os.fsync(writer.fileno())


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--boundary", type=int, default=LAYERS // 2)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large, output = (Path(folder) / name for name in ("small", "large", "out"))
        make_adapter(int(1e5), small)
        make_adapter(int(options.bytes), large)
        start = strip(small, output, options.boundary)
        ratios, peaks = [], []
        for _ in range(options.runs):
            before = time.perf_counter()
            peaks.append(strip(large, output, options.boundary))
            between, kept = time.perf_counter(), output.stat().st_size
            yardstick(large, output, kept)
            ours, theirs = between - before, time.perf_counter() - between
            ratios.append(ours / theirs)
            print(f"strip-layers {ours:.2f} s, reading and writing {theirs:.2f} s", flush=True)
        print(f"{large.stat().st_size:,} bytes, {kept:,} kept on {os.cpu_count()} cores")
        print(f"ratio {statistics.median(ratios):.2f} (median of {options.runs})")
        print(f"peak memory {(max(peaks) - start) / 1024:.1f} MiB above a small adapter's, with")
        print(f"tensors of {options.bytes / (LAYERS * 4) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
