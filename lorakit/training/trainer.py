"""The training loop: LoRA weights on a frozen base, one exact optimiser step a batch.

It goes on step by step from any point, so that a run can be paused, parked and resumed to the same
bytes. It knows nothing of where weights or examples come from, nor of what becomes of the result;
losses and gradients are in loss.py.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import accelerate
import torch

from lorakit.errors import LorakitError
from lorakit.merging.input_norms import InputNorms
from lorakit.merging.pruner import Pruner
from lorakit.models.base import Base
from lorakit.models.batches import epoch_batches
from lorakit.models.forward import activation_checkpointing
from lorakit.models.lora import factors
from lorakit.models.tokens import Example
from lorakit.settings import TrainingSettings
from lorakit.training.lora_step import standing
from lorakit.training.loss import BatchLoss

Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]
Measure = Callable[[], float]


class Watcher(Protocol):
    """Whoever wants to know how training goes; entries are lines of `--log`."""

    def start(self, steps: int, epochs: int, done: int) -> None: ...
    def step(self, entry: Mapping[str, Any]) -> None: ...
    def epoch(self, entry: Mapping[str, Any]) -> None: ...
    def event(self, entry: Mapping[str, Any], text: str) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Progress:
    """How far training has come: all that a resumed run needs beside weights and moments.

    `epoch` counts the whole epochs behind it; `best_value` is the metric of --select-by, higher
    better (the negative loss where that is `loss`), and equal ones are told apart by `best_loss`.
    `loss_sum` and `targets` are of the epoch under way.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_value: float = -math.inf
    best_loss: float = math.inf
    loss_sum: float = 0.0
    targets: int = 0

    @property
    def stale(self) -> int:
        """Epochs since the best one."""
        return self.epoch - self.best_epoch


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """Return the factor of the learning rate at optimiser step 0 … steps-1.

    It rises linearly over the first `warmup` share of the steps, then falls to 0 (linear, cosine)
    or stays (constant).
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    if schedule == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1.0


class Trainer:
    """One training run over the LoRA of a base; `layers` are PEFT's layers by module name.

    `measure` returns the value, higher better, by which epochs are compared (`--select-by`); None
    takes the validation loss.
    """

    def __init__(
        self,
        base: Base,
        layers: Mapping[str, Any],
        settings: TrainingSettings,
        *,
        accelerator: accelerate.Accelerator,
        pruner: Pruner | None = None,
        calibrate_every: int | None = None,
        measure: Measure | None = None,
    ) -> None:
        self.base = base
        self.layers = layers
        self.settings = settings
        self.accelerator = accelerator
        self.pruner = pruner
        self.calibrate_every = calibrate_every
        self.measure = measure
        self.norms = InputNorms(layers)
        self.progress = Progress()
        self.parameters = [weight for layer in layers.values() for weight in factors(layer)]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.losses = BatchLoss(
            base, self.parameters, tokens=settings.micro_batch_tokens, accelerator=accelerator
        )
        self.losses.watch = self.norms.take_mask
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.best = self.weights()

    def weights(self) -> Weights:
        """Return a copy of A and B by module, on the CPU."""
        return {
            name: tuple(weight.detach().cpu().clone() for weight in factors(layer))  # type: ignore[misc]
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def put(self, weights: Weights) -> None:
        """Copy A and B by module into the model."""
        for name, layer in self.layers.items():
            for parameter, value in zip(factors(layer), weights[name], strict=True):
                parameter.copy_(value)

    def begin(
        self, examples: Sequence[Example], validation: Sequence[Example], watcher: Watcher
    ) -> None:
        """Say what to train and validate on, and take the first input norms where pruning asks."""
        self._examples, self._validation, self._watcher = examples, validation, watcher
        self.losses.note = watcher.note
        watcher.start(self.steps, self.settings.epochs, self.progress.step)
        if self._calibrates and not self.norms.version:
            self.validate(validation)

    def train(
        self, examples: Sequence[Example], validation: Sequence[Example], watcher: Watcher
    ) -> Iterator[Progress]:
        """Train until epochs have stopped getting better for `patience` of them, or to the last.

        Yields after every epoch (a caller may save what it needs to go on from there); at the end
        `best` holds the weights of the best epoch on the validation set.
        Raises LorakitError when a loss is not finite.
        """
        self.begin(examples, validation, watcher)
        while not self.is_done:
            self.advance()
            yield self.progress
        self.check()

    def check(self) -> None:
        """Raise LorakitError where no epoch can be kept."""
        if not self.progress.best_epoch:
            raise LorakitError("no epoch had a finite validation loss; lower --lr")

    @property
    def steps(self) -> int:
        """The optimiser steps of all epochs."""
        return self.settings.epochs * self._steps_an_epoch

    @property
    def _steps_an_epoch(self) -> int:
        return math.ceil(len(self._examples) / self.settings.batch_size)

    @property
    def is_done(self) -> bool:
        """Whether the last epoch is over, or `patience` epochs were no better."""
        progress, settings = self.progress, self.settings
        return progress.epoch >= settings.epochs or progress.stale >= settings.patience

    def advance(self, until: int | None = None) -> None:
        """Go on to the end of the epoch under way and judge it, or only to step `until`."""
        progress, started = self.progress, time.perf_counter()
        order = list(self._batches(progress.epoch + 1))
        with self._training_mode():
            for batch in order[progress.step - progress.epoch * len(order) :]:
                if progress.step == until:
                    return
                self._watcher.step(self._step(batch, self.steps))
                if self._is_due():
                    self.validate(self._validation)
        if progress.step < (progress.epoch + 1) * len(order):
            return
        self._end_epoch(time.perf_counter() - started)

    def _batches(self, epoch: int) -> Iterator[list[Example]]:
        return epoch_batches(self._examples, self.settings.batch_size, self.settings.seed, epoch)

    def _end_epoch(self, seconds: float) -> None:
        progress = self.progress
        progress.epoch += 1
        loss = self.validate(self._validation)
        value = -loss if self.measure is None else self.measured()
        self._judge(value, loss)
        entry = {
            "epoch": progress.epoch,
            "step": progress.step,
            "train_loss": progress.loss_sum / progress.targets,
            "validation_loss": loss,
            "best": progress.best_epoch == progress.epoch,
        }
        if self.measure is not None:
            entry["validation_score"] = value
        progress.loss_sum, progress.targets = 0.0, 0
        self._watcher.epoch({**entry, "seconds": round(seconds, 3)})

    def measured(self, measure: Measure | None = None) -> float:
        """Return the value of the model as it stands, the same on every process.

        `measure` is that of the run where none is given, or the negative validation loss.
        """
        measure = measure or self.measure
        with self._dropout(False):
            value = float(measure() if measure else -self.losses.mean(self._validation))
        if measure is None or self.accelerator.num_processes == 1:
            return value
        everywhere = self.losses.summed(torch.tensor(value, device=self.base.device))
        return float(everywhere / self.accelerator.num_processes)

    def _is_due(self) -> bool:
        """Whether the input norms are to be refreshed before the epoch ends."""
        every = self.calibrate_every
        return bool(self._calibrates and every and self.progress.step % every == 0)

    @property
    def _calibrates(self) -> bool:
        return self.pruner is not None and self.pruner.reads_norms

    def _judge(self, value: float, loss: float) -> None:
        progress = self.progress
        if math.isfinite(loss) and (value, -loss) > (progress.best_value, -progress.best_loss):
            progress.best_epoch = progress.epoch
            progress.best_value, progress.best_loss = value, loss
            self.best = self.weights()

    def _step(self, batch: Sequence[Example], steps: int) -> dict[str, Any]:
        """Do one optimiser step on a batch and return its log entry."""
        started, progress = time.perf_counter(), self.progress
        torch.manual_seed(
            self.settings.seed * 1_000_003 + progress.step * 1_009 + self.accelerator.process_index
        )
        loss = self.losses.backward(batch)
        if not math.isfinite(loss):
            raise LorakitError(
                f"the loss is {loss} at step {progress.step + 1}; lower --lr or use --dtype float32"
            )
        if self.pruner is not None and self.pruner.reads_gradients:
            self.pruner.observe_(self.layers)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        rate = self.settings.lr * learning_rate_factor(
            self.settings.schedule, progress.step, steps, self.settings.warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        if self.pruner is not None:
            self.pruner.prune_(self.norms, progress.step)
        targets = sum(row.targets for row in batch)
        progress.loss_sum += loss * targets
        progress.targets += targets
        tokens = sum(len(row.ids) for row in batch)
        return {
            "step": progress.step,
            "epoch": progress.epoch + 1,
            "train_loss": loss,
            "lr": rate,
            "grad_norm": float(norm),
            "tokens_per_second": round(tokens / (time.perf_counter() - started), 1),
        }

    def validate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over all completion tokens; refresh the input norms on the way."""
        with self._dropout(False), contextlib.ExitStack() as stack:
            if self._calibrates:
                stack.enter_context(self.norms.collecting())
            loss = self.losses.mean(examples)
        if self._calibrates:
            self.norms.update_(self.losses.summed)
        return loss

    @contextlib.contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Switch LoRA's dropout on (the frozen base keeps none), and checkpointing if wanted."""
        with contextlib.ExitStack() as stack:
            if self.settings.gradient_checkpointing:
                stack.enter_context(activation_checkpointing(self.base.model))
            stack.enter_context(self._dropout(True))
            stack.enter_context(standing(self.layers))
            yield

    @contextlib.contextmanager
    def _dropout(self, on: bool) -> Iterator[None]:
        before = [layer.lora_dropout.training for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.lora_dropout.train(on)
        try:
            yield
        finally:
            for layer, was in zip(self.layers.values(), before, strict=True):
                layer.lora_dropout.train(was)
