"""What --gradient-checkpointing costs and saves: a training step with and without it, in one run.

A random Llama in the number format that the device is fast at, rank-8 LoRA on query and value, a
micro-batch of one sequence. Each side runs in processes of its own, in turns, after a step to warm
up. `ours` is a step with checkpointing, the peer one without: a ratio below 1 is what it costs. The
limit is the machine's own matrix rate, for the layers' forward pass counted twice.

    python -m tests.benchmarks.checkpointing [--device cpu] [--length 1024] [--width 256]
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from lorakit.models.lora import inject, pick_modules
from lorakit.models.sharing import new_accelerator
from lorakit.settings import TrainingSettings
from lorakit.training.trainer import Trainer
from tests.benchmarks.machine import describe_machine, matrix_rate, pick
from tests.benchmarks.program import as_arguments, main, option
from tests.benchmarks.result import Result
from tests.benchmarks.rounds import Memory, in_turns, ratio_of
from tests.benchmarks.shapes import QUERY_AND_VALUE, Shape, random_base
from tests.benchmarks.side import in_process
from tests.benchmarks.steps import Steps, random_rows, timed_steps

WORDS = 32_000


@dataclass(frozen=True)
class Options:
    width: int = option(256, "the model's width, a multiple of 64")
    layers: int = option(12, "its layers")
    length: int = option(1024, "tokens of the sequence")
    completion: int = option(128, "tokens of it that are learnt")
    steps: int = option(2, "timed steps of a round")
    rounds: int = option(2, "turns of each side")
    device: str = option("auto", "where it computes")
    dtype: str = option("auto", "the number format; auto: the one the device is fast at")

    @property
    def shape(self) -> Shape:
        heads = self.width // 64
        return Shape(WORDS, self.width, self.width * 43 // 16, self.layers, heads, heads, 4096)


SMOKE = Options(width=64, layers=2, length=64, completion=8, steps=1, rounds=1)


def measure(options: Options) -> Result:
    """Take steps with and without checkpointing in turns, and compare them."""
    arguments = as_arguments(options)
    on, off = in_turns(
        lambda: Steps(**in_process(run, {**arguments, "checkpointing": True})[0]),
        lambda: Steps(**in_process(run, {**arguments, "checkpointing": False})[0]),
        options.rounds,
    )
    device, dtype = pick(options.device, options.dtype)
    ratio = ratio_of([r.total for r in on], [r.total for r in off])
    rate, machine = matrix_rate(device, dtype), describe_machine(device, dtype)
    seconds = min(r.total for r in on) / options.steps
    again = 2.0 * options.length * options.shape.layer_weights * options.layers
    due = options.shape.training_flops(options.length, options.completion) + again
    return Result(
        name="checkpointing",
        unit="s a step with it",
        ours=seconds,
        peer=min(r.total for r in off) / options.steps,
        ratio=ratio.median,
        spread=ratio.spread,
        limit=f"{rate / 1e9:.0f} GFLOP/s, the matrix rate in {machine.dtype}",
        limit_share=due / seconds / rate,
        machine=machine,
        details={
            "processor ratio": ratio_of(
                [sum(r.processor) for r in on], [sum(r.processor) for r in off]
            ).median,
            "memory, of that without": min(r.memory for r in on) / min(r.memory for r in off),
            "memory with it above the base, MB": min(r.memory for r in on),
            "difference of the last loss": abs(on[0].losses[-1] - off[0].losses[-1]),
        },
    )


def run(*, checkpointing: bool, **values: Any) -> dict[str, Any]:
    """Return what the steps take, as JSON holds it."""
    options = Options(**values)
    device, dtype = pick(options.device, options.dtype)
    base = random_base(options.shape, device, dtype)
    torch.manual_seed(0)
    layers = inject(base, dict.fromkeys(pick_modules(base, QUERY_AND_VALUE, None), 8))
    settings = TrainingSettings(
        dropout=0.0,
        batch_size=1,
        micro_batch_tokens=options.length,
        schedule="constant",
        gradient_checkpointing=checkpointing,
    )
    trainer = Trainer(base, layers, settings, accelerator=new_accelerator(device.type))
    row = random_rows(1, options.length + 1, options.completion, WORDS, seed=0)
    memory = Memory(device)
    with trainer._training_mode():
        work = [lambda: trainer._step(row, 10**6).train_loss] * (options.steps + 1)
        return asdict(timed_steps(work, memory, device)[0])


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)
