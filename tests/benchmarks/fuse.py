"""`lorakit fuse` against PEFT's merge_and_unload, from files to files: time, memory and tensors.

A random model of Llama 3.2 1B's shape (1.24 billion parameters, bfloat16, one file) and a rank-16
adapter on all seven projections are written to a temporary folder. PEFT's side loads the model in
its dtype, merges and saves it. Each side runs in processes of its own, which count whole, Python's
start included, in turns; PEFT's over lorakit's time is the median of the rounds, by the clock and
by the processor. Memory is the largest peak of the resident set. In the first round
lorakit also runs with the check of logits, which PEFT does not make; the goals are without it.

Then both sides write float32, where the tensors must be equal to 1e-6; lorakit's bfloat16 ones must
be these rounded once. How many of PEFT's differ from them is printed.

    python tests/benchmarks/fuse.py [--layers 16] [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.models.lora import projections
from tests.support.models import byte_tokenizer

RANK = 16
MOST_MEMORY, LEAST_SPEED = 0.3, 2.0  # the goals: of PEFT's peak, and PEFT's over lorakit's time
WAYS = ("lorakit --no-check", "PEFT", "lorakit")

# A child reads its own VmHWM: the peak that resource.getrusage gives includes that of its parent.
MEASURE = """
import pathlib, time
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
print(*(line.split()[1] for line in lines if line.startswith("VmHWM")), time.process_time())
"""
LORAKIT = f"""
from lorakit.cli import lorakit
lorakit.main(standalone_mode=False)
{MEASURE}"""
PEFT = f"""
import sys
import peft, transformers
base, adapter, output, dtype = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
{MEASURE}"""


class Turn(NamedTuple):
    """What a process took: seconds by the clock and of processor time, and its peak in bytes."""

    seconds: float
    processor: float
    peak: int

    def words(self) -> str:
        return (
            f"{self.seconds:.1f} s, {self.processor:.1f} s of processor time, peak "
            f"{self.peak / 1e9:.2f} GB"
        )


def prepare(folder: Path, layers: int) -> None:
    """Write the base and the adapter."""
    config = transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    torch.manual_seed(0)
    weights = {
        name: torch.empty(weight.shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, weight in model.named_parameters()
    }
    (folder / "base").mkdir()
    save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    save_adapter(random_adapter(model), f"{folder / 'adapter'}/")


def random_adapter(model: Any) -> Adapter:
    """Return an adapter of RANK on every projection of the layers, in float32."""
    draw = np.random.default_rng(0)
    shapes = {name: shape for name, shape in projections(model).items() if "layers." in name}
    pairs = {
        name: (
            draw.standard_normal((RANK, columns), np.float32) / 50,
            draw.standard_normal((rows, RANK), np.float32) / 50,
        )
        for name, (rows, columns) in shapes.items()
    }
    return Adapter(tensors_of(pairs), peft_config(dict.fromkeys(shapes, RANK), base=None))


def run(way: str, folder: Path, output: str, dtype: str, threads: int) -> Turn:
    """Run one side in a process of its own; end where it fails."""
    base, adapter, to = (str(folder / name) for name in ("base", "adapter", output))
    if way == "PEFT":
        arguments = [PEFT, base, adapter, to, dtype]
    else:
        options = ["--model", base, "-o", to, "--dtype", dtype, "-q", *way.split()[1:]]
        arguments = [LORAKIT, "fuse", adapter, *options]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr)
    peak, processor = done.stdout.split()[-2:]
    return Turn(seconds, float(processor), 1024 * int(peak))


def rounds(folder: Path, count: int, threads: int) -> dict[str, list[Turn]]:
    """Run the ways in turns, with the check in the first alone; the last round's outputs stay."""
    turns: dict[str, list[Turn]] = {way: [] for way in WAYS}
    for number in range(count):
        for place, way in enumerate(WAYS[: 3 if number == 0 else 2]):
            turn = run(way, folder, f"{number}-{place}", "bfloat16", threads)
            turns[way].append(turn)
            print(f"round {number + 1}, {way}: {turn.words()}", flush=True)
            delete(folder / f"{number - 1}-{place}")
    return turns


def delete(folder: Path) -> None:
    for path in folder.glob("*"):
        path.unlink()


def tensors(folder: Path) -> dict[str, Any]:
    """Return slices of a model's tensors by name, read when they are asked for."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118


def compare(folder: Path, last: int, threads: int) -> None:
    """Write float32 on both sides, and compare what all have written."""
    for place, way in enumerate(("lorakit --no-check", "PEFT")):
        run(way, folder, f"float32-{place}", "float32", threads)
    ours, theirs = (tensors(folder / f"{last}-{place}") for place in range(2))
    exact, peft = (tensors(folder / f"float32-{place}") for place in range(2))
    if not ours.keys() == exact.keys() == peft.keys() == theirs.keys():
        sys.exit("the models hold other tensors")
    farthest, differ, count = 0.0, 0, 0
    for name in ours:
        whole, rounded = exact[name][:], ours[name][:]
        farthest = max(farthest, float((whole - peft[name][:]).abs().max()))
        if not torch.equal(whole.to(torch.bfloat16), rounded):
            sys.exit(f"{name} is not the float32 weight rounded once")
        differ += int((rounded != theirs[name][:]).sum())
        count += rounded.numel()
    print(f"float32: the largest difference of {count:,} values is {farthest:.1e}")
    print(f"bfloat16: lorakit's are those rounded once; {differ:,} of PEFT's differ from them")
    if farthest > 1e-6:
        sys.exit("the float32 tensors differ")


def report(turns: dict[str, list[Turn]]) -> bool:
    """Print what PEFT takes of each of lorakit's ways, and return whether the goals are met."""
    for way in ("lorakit --no-check", "lorakit"):
        by_clock, by_processor = (ratios(turns, way, kind) for kind in range(2))
        print(
            f"PEFT over {way}: {words(by_clock)} by the clock, {words(by_processor)} of processor"
        )
    peaks = {way: max(turn.peak for turn in taken) for way, taken in turns.items()}
    memory = {way: peaks[way] / peaks["PEFT"] for way in turns if way != "PEFT"}
    print(", ".join(f"peak of {way} over PEFT's: {share:.2f}" for way, share in memory.items()))
    fast = statistics.median(ratios(turns, "lorakit --no-check", 0)) >= LEAST_SPEED
    return fast and memory["lorakit --no-check"] <= MOST_MEMORY


def ratios(turns: dict[str, list[Turn]], way: str, kind: int) -> list[float]:
    """Return PEFT's over one way's time in each round: 0 by the clock, 1 of the processor."""
    pairs = zip(turns["PEFT"], turns[way], strict=False)
    return [theirs[kind] / ours[kind] for theirs, ours in pairs]


def words(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}× ({min(values):.2f} to {max(values):.2f})"


def machine(threads: int) -> str:
    """Return what the machine computes with, in words."""
    text = Path("/proc/cpuinfo").read_text()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    useful = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{os.cpu_count()} cores ({', '.join(useful)}), {threads} threads, bfloat16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dir", help="where the temporary folder is made: 25 GB for 16 layers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        prepare(folder, options.layers)
        print(machine(options.threads), flush=True)
        met = report(rounds(folder, options.rounds, options.threads))
        compare(folder, options.rounds - 1, options.threads)
    if not met:
        sys.exit(f"the goals are {LEAST_SPEED}× the speed and {MOST_MEMORY}× the memory")


if __name__ == "__main__":
    main()
