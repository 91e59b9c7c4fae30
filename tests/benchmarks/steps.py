"""Training steps of lorakit and of PEFT on the same base, adapters and batches.

The peer is PEFT with all adapters active. It pads a batch to its longest row and computes the
logits of every position, as PEFT with a Trainer does.
"""

from __future__ import annotations

import functools
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import peft
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import save_adapter
from lorakit.merging.input_norms import InputNorms
from lorakit.merging.joint import attach_stack
from lorakit.merging.pruner import Pruner
from lorakit.merging.stack import stack
from lorakit.models.base import Base
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.settings import PruningSettings, TrainingSettings
from lorakit.training.step_hook import StepHook
from lorakit.training.trainer import Trainer
from tests.benchmarks.machine import Moment, synchronise
from tests.benchmarks.peers import as_transformers_has_it
from tests.benchmarks.rounds import Memory
from tests.benchmarks.shapes import Shape

LR = 2e-4
RATIO = Decimal("0.1")  # that a merge prunes

Batches = Sequence[Sequence[Example]]
_PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "mkldnn::_linear_pointwise",
)
_ATTENTION = re.compile("dot_product_|(flash|efficient|varlen)_attn|_attention_(for|back)ward")


@dataclass(frozen=True)
class Steps:
    """What some steps took, in seconds each, and their peak of memory in MB; the losses of all.

    The first step, which warms up, is left out of the times but for `first`. `pruning` is its share
    of a step, and `products` and `attention` those of matrix products and of attention in the time
    of all operations, which is `busy` of a step: on a GPU less than 1 while it waits for Python.
    """

    seconds: list[float]
    processor: list[float]
    memory: float
    losses: list[float]
    first: float = 0.0
    pruning: float = 0.0
    products: float = 0.0
    attention: float = 0.0
    busy: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds)


def random_rows(count: int, length: int, completion: int, words: int, seed: int) -> list[Example]:
    """Return rows of random tokens, of half to all of these lengths, but for the longest."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        share = 1.0 if number == 0 else draw.uniform(0.5, 1.0)
        size = max(4, int(share * length))
        ids = tuple(draw.randrange(3, words) for _ in range(size))
        rows.append(Example(ids, size - max(1, int(share * completion)), f"random:{number}"))
    return rows


def tokens_of(batches: Batches) -> tuple[int, int]:
    """Return the tokens of the timed batches, and those that are learnt."""
    rows = [row for batch in batches[1:] for row in batch]
    return sum(len(row.ids) for row in rows), sum(row.targets for row in rows)


def share_of_limit(shape: Shape, batches: Batches, seconds: float, rate: float) -> float:
    """Return the share of the matrix rate at which the timed batches were learnt."""
    return shape.training_flops(*tokens_of(batches)) / seconds / rate


def timed_steps(
    steps: Sequence[Callable[[], float]], memory: Memory, device: torch.device
) -> tuple[Steps, list[float]]:
    """Run the steps, which return their losses; return also the seconds of all."""
    seconds, processor, losses = [], [], []
    for step in steps:
        started, used = time.perf_counter(), time.process_time()
        losses.append(step())
        synchronise(device)
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return Steps(seconds[1:], processor[1:], memory.peak(), losses, seconds[0]), seconds


def lorakit_steps(
    base: Base,
    adapters: Sequence[Adapter],
    batches: Batches,
    *,
    micro_batch_tokens: int | None = None,
    prunes: bool = True,
    parts: bool = True,
) -> Steps:
    """Train the stacked adapters on the batches, a step each, pruning as `merge` does.

    With `parts`, another step tells what operations take.
    """
    trainer, pruner = merging_trainer(base, adapters, micro_batch_tokens, prunes=prunes)
    memory = Memory(base.device)
    if prunes:
        trainer.validate(batches[0])
    with trainer._training_mode():
        updates = [lambda b=batch: trainer._step(b, 10**6).train_loss for batch in batches]
        steps, seconds = timed_steps(updates, memory, base.device)
        steps = with_parts(steps, updates[-1], base.device) if parts else steps
    shares = [a / b for a, b in zip(pruner.seconds[1:], seconds[1:], strict=False)]
    return replace(steps, pruning=statistics.median(shares) if shares else 0.0)


def with_parts(steps: Steps, step: Callable[[], float], device: torch.device) -> Steps:
    """Return the steps with the shares of a last one's operations, by their times."""
    with torch.profiler.profile() as profile:
        step()
        synchronise(device)
    kind = "device" if device.type == "cuda" else "cpu"
    times = {
        event.key: getattr(event, f"self_{kind}_time_total")  # microseconds
        for event in profile.key_averages()
        if event.device_type.name == "CPU"  # a kernel's time is in its operation's
    }
    total = sum(times.values())
    products = sum(times.get(name, 0.0) for name in _PRODUCTS)
    attention = sum(seconds for name, seconds in times.items() if _ATTENTION.search(name))
    return replace(
        steps,
        products=products / total,
        attention=attention / total,
        busy=total / 1e6 / steps.seconds[-1],
    )


def merging_trainer(
    base: Base, adapters: Sequence[Adapter], micro_batch_tokens: int | None, *, prunes: bool
) -> tuple[Trainer, TimedHook]:
    """Return a trainer of the stacked adapters, and its pruner, timed."""
    stacked = stack(adapters)
    layers = attach_stack(base, stacked, dropout=0.0)
    norms = InputNorms(layers)
    pruner = Pruner(stacked.blocks, layers, PruningSettings(RATIO), norms=norms)
    hook = TimedHook(pruner, base.device)
    settings = TrainingSettings(
        lr=LR,
        dropout=0.0,
        batch_size=8,
        micro_batch_tokens=micro_batch_tokens,
        schedule="constant",
        warmup=0.0,
    )
    accelerator = new_accelerator(base.device.type)
    hooks = (norms, hook) if prunes else ()
    return Trainer(base, layers, settings, accelerator=accelerator, hooks=hooks), hook


class TimedHook(StepHook):
    """Times what another hook does after each step; a GPU is not waited for until they are read."""

    name = "timed"

    def __init__(self, hook: StepHook, device: torch.device) -> None:
        self._hook, self._device = hook, device
        self._spans: list[tuple[Moment, Moment]] = []

    @property
    def seconds(self) -> list[float]:
        """The seconds after each step."""
        return [begun.until(ended) for begun, ended in self._spans]

    def after_step(self, step: int) -> None:
        begun = Moment(self._device)
        self._hook.after_step(step)
        self._spans.append((begun, Moment(self._device)))


def save_folders(adapters: Sequence[Adapter], folder: Path) -> list[str]:
    """Write adapters as PEFT reads them; return their folders."""
    folders = [f"{folder}/adapter{number}/" for number in range(len(adapters))]
    for adapter, path in zip(adapters, folders, strict=True):
        save_adapter(adapter, path)
    return folders


def peft_steps(
    model: Any, folders: Sequence[str], batches: Batches, *, parts: bool = True
) -> Steps:
    """Train PEFT's active adapters on the batches, a step each; the model is left without them.

    With `parts`, another step tells what operations take.
    """
    device = torch.device(next(model.parameters()).device)
    with_lora = active_adapters(model, folders)
    parameters = [p for name, p in with_lora.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)

    def step(batch: Sequence[Example]) -> float:
        loss = with_lora(**padded(batch, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    updates = [functools.partial(step, batch) for batch in batches]
    with as_transformers_has_it(model):
        steps, _ = timed_steps(updates, Memory(device), device)
        steps = with_parts(steps, updates[-1], device) if parts else steps
    with_lora.unload()
    return steps


def active_adapters(model: Any, folders: Sequence[str]) -> Any:
    """Return PEFT's model with the adapters of these folders, all active and in training."""
    lora: Any = peft.PeftModel.from_pretrained(
        model, folders[0], adapter_name="0", is_trainable=True
    )
    names = [str(number) for number in range(len(folders))]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        lora.load_adapter(folder, name, is_trainable=True)
    lora.base_model.set_adapter(names)
    return lora.train()


def padded(batch: Sequence[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch padded on the right to its longest row, with a label for each completion."""
    length = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(batch):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        labels[place, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
        mask[place, : len(row.ids)] = 1
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in tensors.items()}
