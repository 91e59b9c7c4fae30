"""What --gradient-checkpointing costs and saves: a training step with and without it, in one run.

A random Llama in bfloat16 (float32 on a CPU), rank-8 LoRA on query and value, a micro-batch of one
sequence. Each side runs in processes of its own, in turns; the fastest step counts (on a CPU its
processor time), and memory is the least peak above what was held before the steps.

    python tests/benchmarks/checkpointing.py [--device cpu] [--length 1024] [--width 256]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lorakit.models.devices import pick_device
from lorakit.models.loading import load_base
from lorakit.models.lora import inject, pick_modules
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.settings import TrainingSettings
from lorakit.training.trainer import Trainer
from tests.benchmarks.load_memory import WORDS, save_random_llama
from tests.benchmarks.train_step import Memory, timed

COMPLETION = 128  # tokens that are learnt


def random_example(length: int) -> Example:
    draw = random.Random(0)
    ids = tuple(draw.randrange(3, WORDS) for _ in range(length + 1))
    return Example(ids, length + 1 - COMPLETION, "a random row")


def measure(
    folder: str, device: torch.device, length: int, steps: int, *, checkpointing: bool
) -> None:
    """Take the steps, the first of them to warm up, and print a line of JSON."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base = load_base(folder, device=device, dtype=dtype)
    torch.manual_seed(0)
    layers = inject(base, dict.fromkeys(pick_modules(base, ["q_proj", "v_proj"], None), 8))
    settings = TrainingSettings(
        dropout=0.0,
        batch_size=1,
        micro_batch_tokens=length,
        schedule="constant",
        gradient_checkpointing=checkpointing,
    )
    trainer = Trainer(base, layers, settings, accelerator=new_accelerator(device.type))
    losses: list[float] = []

    def step() -> None:
        losses.append(trainer._step([random_example(length)], 10**6).train_loss)

    memory = Memory(device)
    with trainer._training_mode():
        measured = timed([step] * (steps + 1), memory, device)
    print(json.dumps({**measured, "losses": losses}))


def measured_with(folder: str, *, checkpointing: bool) -> dict[str, Any]:
    """Return what a process of its own has measured."""
    side = ["--folder", folder, *(["--checkpointing"] if checkpointing else [])]
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], *side],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the sequence")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = pick_device(options.device)
    if options.folder:
        measure(
            options.folder,
            device,
            options.length,
            options.steps,
            checkpointing=options.checkpointing,
        )
        return
    results: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder), options.width, options.layers)
        for _ in range(options.rounds):
            for on, rounds in results.items():
                rounds.append(measured_with(folder, checkpointing=on))
    report(results, "processor" if device.type == "cpu" else "seconds")


def report(results: dict[bool, list[dict[str, Any]]], clock: str) -> None:
    """Print time and memory without and with checkpointing, their ratios, and the losses' gap."""
    seconds = {on: min(min(r[clock]) for r in rounds) for on, rounds in results.items()}
    memory = {on: min(r["memory"] for r in rounds) for on, rounds in results.items()}
    for on, words in {False: "without", True: "with"}.items():
        print(f"{words:8}{seconds[on]:8.3f} {clock} a step{memory[on]:9.0f} MB above the base")
    print(f"time: {seconds[True] / seconds[False]:.2f}×")
    print(f"memory: {memory[True] / memory[False]:.2f}×")
    off = abs(results[True][0]["losses"][-1] - results[False][0]["losses"][-1])
    print(f"difference of the last loss: {off:.1e}")


if __name__ == "__main__":
    main()
