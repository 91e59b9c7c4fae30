"""What --gradient-checkpointing costs and saves: a training step with and without it, in one run.

A random Llama in bfloat16 (float32 on a CPU), rank-8 LoRA on query and value, a micro-batch of one
sequence. Of each step the fastest round counts, with and without in turns; memory is the peak above
what was held before the steps.

    python tests/benchmarks/checkpointing.py [--device cpu] [--length 1024] [--width 512]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from lorakit.models.base import Base
from lorakit.models.devices import pick_device
from lorakit.models.loading import load_base
from lorakit.models.lora import inject, pick_modules
from lorakit.models.tokens import Example
from lorakit.settings import TrainingSettings
from lorakit.training.loss import new_accelerator
from lorakit.training.trainer import Trainer
from tests.benchmarks.load_memory import WORDS, save_random_llama
from tests.benchmarks.train_step import Memory, timed

COMPLETION = 128  # tokens that are learnt


def random_example(length: int) -> Example:
    draw = random.Random(0)
    ids = tuple(draw.randrange(3, WORDS) for _ in range(length + 1))
    return Example(ids, length + 1 - COMPLETION, "a random row")


def measure(base: Base, length: int, steps: int, *, checkpointing: bool) -> dict[str, Any]:
    """Return what the steps took, the first of them to warm up."""
    torch.manual_seed(0)
    layers = inject(base, dict.fromkeys(pick_modules(base, ["q_proj", "v_proj"], None), 8))
    settings = TrainingSettings(
        dropout=0.0,
        batch_size=1,
        micro_batch_tokens=length,
        schedule="constant",
        gradient_checkpointing=checkpointing,
    )
    trainer = Trainer(base, layers, settings, accelerator=new_accelerator(base.device.type))
    losses: list[float] = []

    def step() -> None:
        losses.append(trainer._step([random_example(length)], 10**6).train_loss)

    with trainer._training_mode():
        step()  # the optimiser's moments are no activations
        measured = timed([step] * (steps + 1), Memory(base.device), base.device)
    return {**measured, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the sequence")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    device = pick_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder), options.width, options.layers)
        base = load_base(folder, device=device, dtype=dtype)
        results: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for _ in range(options.rounds):
            for checkpointing, rounds in results.items():
                rounds.append(
                    measure(base, options.length, options.steps, checkpointing=checkpointing)
                )
    seconds = {on: min(map(min, (r["seconds"] for r in found))) for on, found in results.items()}
    memory = {on: statistics.median(r["memory"] for r in found) for on, found in results.items()}
    for on, words in {False: "without", True: "with"}.items():
        print(f"{words:8}{seconds[on]:8.3f} s a step{memory[on]:9.0f} MB above the base")
    print(f"time: {seconds[True] / seconds[False]:.2f}×")
    print(f"memory: {memory[True] / memory[False]:.2f}×")
    off = abs(results[True][0]["losses"][-1] - results[False][0]["losses"][-1])
    print(f"difference of the last loss: {off:.1e}")


if __name__ == "__main__":
    main()
