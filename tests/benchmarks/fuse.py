"""`lorakit fuse` against PEFT's merge_and_unload, from files to files: time, memory and tensors.

A random model of Llama 3.2 1B's width (bfloat16, one file; 1.24 billion parameters at its 16
layers) and a rank-16 adapter on all seven projections are written to a temporary folder. PEFT's
side loads the model in its dtype, merges and saves it. Each side runs in processes of its own,
which count whole, Python's start included, in turns; neither side checks logits, which lorakit does
by default: that way is timed once. Memory is the largest peak of the resident set.

Then both sides write float32, where the tensors must be equal to 1e-6; lorakit's bfloat16 ones must
be these rounded once. How many of PEFT's differ from them is counted.

    python -m tests.benchmarks.fuse [--layers 4] [--rounds 2] [--folder FOLDER]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.program import main, option
from tests.benchmarks.result import BenchmarkError, Result
from tests.benchmarks.rounds import in_turns, ratio_of
from tests.support.models import byte_tokenizer

RANK = 16
CLOSE = 1e-6  # how far float32 tensors may differ
OURS, CHECKED, PEER = "lorakit --no-check", "lorakit", "PEFT"


@dataclass(frozen=True)
class Options:
    layers: int = option(4, "the model's layers; 16 are Llama 3.2 1B, and take 25 GB of disk")
    width: int = option(2048, "its width, a multiple of 64")
    words: int = option(128_256, "its vocabulary")
    rounds: int = option(2, "turns of each side")
    threads: int = option(os.cpu_count() or 1, "threads of each process")
    folder: str = option(None, "where the temporary folder is made", str)


SMOKE = Options(layers=2, width=64, words=512, rounds=1)


# A child reads its own VmHWM: the peak that resource.getrusage gives includes that of its parent.
MEASURE = """
import pathlib, time
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
print(*(line.split()[1] for line in lines if line.startswith("VmHWM")), time.process_time())
"""
LORAKIT_CODE = f"""
from lorakit.cli import lorakit
lorakit.main(standalone_mode=False)
{MEASURE}"""
PEFT_CODE = f"""
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


def measure(options: Options) -> Result:
    """Fuse by both in turns, compare what they took, and what they wrote."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        prepare(folder, options)
        checked = run(CHECKED, folder, "checked", "bfloat16", options.threads)
        ours, theirs = in_turns(
            lambda: run(OURS, folder, "ours", "bfloat16", options.threads),
            lambda: run(PEER, folder, "theirs", "bfloat16", options.threads),
            options.rounds,
        )
        tensors = compare(folder, options.threads)
    return compared(ours, theirs, checked, tensors)


def compared(
    ours: Sequence[Turn], theirs: Sequence[Turn], checked: Turn, tensors: dict[str, object]
) -> Result:
    """Return the result of both sides' rounds."""
    ratio = ratio_of([turn.seconds for turn in ours], [turn.seconds for turn in theirs])
    processor = ratio_of([turn.processor for turn in ours], [turn.processor for turn in theirs])
    own, other = (max(turn.peak for turn in side) for side in (ours, theirs))
    return Result(
        name="fuse",
        unit="s, files to files",
        ours=min(turn.seconds for turn in ours),
        peer=min(turn.seconds for turn in theirs),
        ratio=ratio.median,
        spread=ratio.spread,
        machine=describe_machine(torch.device("cpu"), torch.bfloat16),
        details={
            "processor ratio": processor.median,
            "seconds with the check of logits": checked.seconds,
            "memory, of the peer's": own / other,
            "memory with the check, of the peer's": checked.peak / other,
            "peak, MB": own / 1e6,
            **tensors,
        },
    )


def prepare(folder: Path, options: Options) -> None:
    """Write the base and the adapter."""
    config = transformers.LlamaConfig(
        vocab_size=options.words,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=max(1, options.width // 256),
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
            np.float32(0.02) * draw.standard_normal((RANK, columns), np.float32),
            np.float32(0.02) * draw.standard_normal((rows, RANK), np.float32),
        )
        for name, (rows, columns) in shapes.items()
    }
    return Adapter(tensors_of(pairs), peft_config(dict.fromkeys(shapes, RANK), base=None))


def run(way: str, folder: Path, output: str, dtype: str, threads: int) -> Turn:
    """Run one side in a process of its own; raise BenchmarkError where it fails."""
    base, adapter, to = (str(folder / name) for name in ("base", "adapter", output))
    shutil.rmtree(to, ignore_errors=True)  # of the turn before
    if way == PEER:
        arguments = [PEFT_CODE, base, adapter, to, dtype]
    else:
        options = ["--model", base, "-o", to, "--dtype", dtype, "-q", *way.split()[1:]]
        arguments = [LORAKIT_CODE, "fuse", adapter, *options]
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
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise BenchmarkError(f"{way}: {lines[-1]}")
    peak, processor = done.stdout.split()[-2:]
    return Turn(seconds, float(processor), 1024 * int(peak))


def tensors(folder: Path) -> dict[str, Any]:
    """Return slices of a model's tensors by name, read when they are asked for."""
    files: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118


def compare(folder: Path, threads: int) -> dict[str, object]:
    """Write float32 on both sides; return what was compared with the last round's outputs.

    Raises BenchmarkError where tensors are not what they should be.
    """
    for way, output in ((OURS, "exact"), (PEER, "peft")):
        run(way, folder, output, "float32", threads)
    ours, theirs, exact, peft = (
        tensors(folder / name) for name in ("ours", "theirs", "exact", "peft")
    )
    if not ours.keys() == exact.keys() == peft.keys() == theirs.keys():
        raise BenchmarkError("the models hold other tensors")
    farthest, differ = 0.0, 0
    for name in ours:
        whole, rounded = exact[name][:], ours[name][:]
        farthest = max(farthest, float((whole - peft[name][:]).abs().max()))
        if not torch.equal(whole.to(torch.bfloat16), rounded):
            raise BenchmarkError(f"{name} is not the float32 weight rounded once")
        differ += int((rounded != theirs[name][:]).sum())
    if farthest > CLOSE:
        raise BenchmarkError(f"the float32 tensors differ by {farthest:.1e}")
    return {
        "largest difference in float32": farthest,
        "weights of the peer's not rounded once": differ,
    }


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)
