"""Peak host memory while a base is loaded, against the size of its checkpoint.

A random Llama is written in bfloat16 and loaded on the CPU, each way in a process of its own: in
the checkpoint's dtype, in float32, in 8 and 4 bits (bitsandbytes), and in two shards, for which the
larger of the two processes counts. `own` is the peak of what the process itself holds, above what
it held before; `mapped` that of the pages of the checkpoint's files in memory, which all processes
of a machine share and which the system takes back when it needs them; `after` is what is held in
the end. All are in multiples of the checkpoint's size.

    python tests/benchmarks/load_memory.py [--width 1024] [--layers 12]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from lorakit.models.loading import load_base
from lorakit.models.sharing import new_accelerator
from lorakit.runs.processes import process_count
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
KINDS = {"own": "RssAnon", "mapped": "RssFile"}


def save_random_llama(folder: Path, width: int, layers: int) -> int:
    """Write a random Llama in bfloat16 and a byte tokenizer; return the size of its weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    byte_tokenizer().save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def held() -> dict[str, int]:
    """Return what this process holds, in bytes, by the names of KINDS."""
    text = Path("/proc/self/status").read_text()
    return {kind: 1024 * int(text.split(f"{name}:")[1].split()[0]) for kind, name in KINDS.items()}


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


def measure(folder: str, way: str) -> None:
    """Load the base in one way, and print a line of JSON."""
    if process_count() > 1:
        new_accelerator("cpu")
    before = held()
    peaks = dict(before)
    with watching(peaks):
        base = load_base(folder, device=torch.device("cpu"), **WAYS[way])
    after = held()
    sizes = {kind: peaks[kind] - before[kind] for kind in KINDS}
    print(json.dumps({**sizes, "after": after["own"] - before["own"]}) + "\n", end="")
    del base


def measured(folder: str, way: str) -> dict[str, int]:
    """Return what the processes that load the base in one way have measured, the largest of each.

    The processes of shards are started by torchrun.
    """
    shards = "shard" in WAYS[way]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if shards else []
    done = subprocess.run(
        [sys.executable, *launch, __file__, "--folder", folder, "--way", way],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {kind: max(line[kind] for line in lines) for kind in lines[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.folder, options.way)
        return
    with tempfile.TemporaryDirectory() as folder:
        size = save_random_llama(Path(folder), options.width, options.layers)
        print(f"checkpoint {size / 1e6:.0f} MB{'own':>18}{'mapped':>8}{'after':>8}")
        for way in WAYS:
            shares = [f"{found / size:8.2f}" for found in measured(folder, way).values()]
            print(f"{way:24}  {''.join(shares)}", flush=True)


if __name__ == "__main__":
    main()
