"""The training loop: LoRA weights on a frozen base, one exact optimiser step a batch.

A batch is cut into micro-batches of a fixed number of tokens; their summed losses over the tokens
of the whole batch give its exact mean loss and gradient, on one process or shared out over several.
It knows nothing of where weights or examples come from, nor of what becomes of the result.
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

from lorakit.batching import IGNORED, epoch_batches, lay_out, micro_batches
from lorakit.calibration import InputNorms
from lorakit.encoding import Example
from lorakit.errors import LorakitError
from lorakit.forward import activation_checkpointing, completion_logits
from lorakit.lora import factors
from lorakit.model import Base
from lorakit.settings import TrainingSettings

Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Watcher(Protocol):
    """Whoever wants to know how training goes; entries are lines of `--log`."""

    def start(self, steps: int, epochs: int, done: int) -> None: ...
    def step(self, entry: Mapping[str, Any]) -> None: ...
    def epoch(self, entry: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class Pruner(Protocol):
    """Whoever zeroes parameters after each optimiser step."""

    def prune_(self, norms: InputNorms) -> None: ...


@dataclass
class Progress:
    """How far training has come: all that a resumed run needs beside weights and moments."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf

    @property
    def stale(self) -> int:
        """Epochs since the best one."""
        return self.epoch - self.best_epoch


def new_accelerator(device: str) -> accelerate.Accelerator:
    """Return the accelerator of this process, of one or of many (`accelerate launch`, torchrun).

    `device` is the kind that was picked, never `auto`. A CPU must be named: left to itself it takes
    each of several processes for the only one.
    """
    return accelerate.Accelerator(cpu=device == "cpu")


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
    """One training run over the LoRA of a base; `layers` are PEFT's layers by module name."""

    def __init__(
        self,
        base: Base,
        layers: Mapping[str, Any],
        settings: TrainingSettings,
        *,
        accelerator: accelerate.Accelerator,
        pruner: Pruner | None = None,
        calibrate_every: int | None = None,
    ) -> None:
        self.base = base
        self.layers = layers
        self.settings = settings
        self.accelerator = accelerator
        self.pruner = pruner
        self.calibrate_every = calibrate_every
        self.norms = InputNorms(layers)
        self.tokens = settings.micro_batch_tokens
        self.note: Callable[[str], None] = lambda text: None
        self.progress = Progress()
        self.parameters = [weight for layer in layers.values() for weight in factors(layer)]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
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

    def train(
        self, examples: Sequence[Example], validation: Sequence[Example], watcher: Watcher
    ) -> Iterator[Progress]:
        """Train until the validation loss has not fallen for `patience` epochs, or to the last.

        Yields after every epoch (a caller may save what it needs to go on from there); at the end
        `best` holds the weights of the epoch with the lowest validation loss.
        Raises LorakitError when a loss is not finite.
        """
        settings = self.settings
        steps = settings.epochs * math.ceil(len(examples) / settings.batch_size)
        self.note = watcher.note
        watcher.start(steps, settings.epochs, self.progress.step)
        with self._training_mode():
            if self.pruner is not None:
                self.validate(validation)
            while self.progress.epoch < settings.epochs and not self._is_stale():
                self._epoch(examples, validation, steps, watcher)
                yield self.progress
        if not self.progress.best_epoch:
            raise LorakitError("no epoch had a finite validation loss; lower --lr")

    def _is_stale(self) -> bool:
        return self.progress.stale >= self.settings.patience

    def _epoch(
        self,
        examples: Sequence[Example],
        validation: Sequence[Example],
        steps: int,
        watcher: Watcher,
    ) -> None:
        progress, settings = self.progress, self.settings
        progress.epoch += 1
        torch.manual_seed(
            settings.seed * 1_000_003 + progress.epoch * 1_009 + self.accelerator.process_index
        )
        loss_sum, targets, started = 0.0, 0, time.perf_counter()
        for batch in epoch_batches(examples, settings.batch_size, settings.seed, progress.epoch):
            entry = self._step(batch, steps)
            loss_sum += entry["train_loss"] * (count := sum(row.targets for row in batch))
            targets += count
            watcher.step(entry)
            if self._is_due():
                self.validate(validation)
        loss = self.validate(validation)
        self._judge(loss)
        entry = {
            "epoch": progress.epoch,
            "step": progress.step,
            "train_loss": loss_sum / targets,
            "validation_loss": loss,
            "best": progress.best_epoch == progress.epoch,
        }
        watcher.epoch({**entry, "seconds": round(time.perf_counter() - started, 3)})

    def _is_due(self) -> bool:
        """Whether the input norms are to be refreshed before the epoch ends."""
        every = self.calibrate_every
        return bool(self.pruner and every and self.progress.step % every == 0)

    def _judge(self, loss: float) -> None:
        if loss < self.progress.best_loss:
            self.progress.best_epoch, self.progress.best_loss = self.progress.epoch, loss
            self.best = self.weights()

    def _step(self, batch: Sequence[Example], steps: int) -> dict[str, Any]:
        """Do one optimiser step on a batch and return its log entry."""
        started = time.perf_counter()
        loss = self.backward(batch)
        if not math.isfinite(loss):
            raise LorakitError(
                f"the loss is {loss} at step {self.progress.step + 1}; "
                "lower --lr or use --dtype float32"
            )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        rate = self.settings.lr * learning_rate_factor(
            self.settings.schedule, self.progress.step, steps, self.settings.warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.pruner is not None:
            self.pruner.prune_(self.norms)
        self.progress.step += 1
        tokens = sum(len(row.ids) for row in batch)
        return {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "train_loss": loss,
            "lr": rate,
            "grad_norm": float(norm),
            "tokens_per_second": round(tokens / (time.perf_counter() - started), 1),
        }

    def backward(self, batch: Sequence[Example]) -> float:
        """Add up the gradient of the batch's mean loss over its completion tokens; return it.

        Where memory does not suffice, the micro-batches are halved from here on, and a note says
        so; LorakitError where a single example is too much.
        """
        while True:
            try:
                loss = self._add_gradients(batch)
            except torch.OutOfMemoryError as error:
                self._halve(batch, error)
            else:
                self._sum_gradients()
                return float(self._summed(loss))

    def _add_gradients(self, batch: Sequence[Example]) -> torch.Tensor:
        targets = sum(row.targets for row in batch)
        total = torch.zeros((), device=self.base.device)
        for rows in self._own(micro_batches(batch, self.tokens)):
            loss = self._loss(rows) / targets
            loss.backward()
            total += loss.detach()
        return total

    def _halve(self, batch: Sequence[Example], error: torch.OutOfMemoryError) -> None:
        self.optimizer.zero_grad()
        if self.tokens <= max(len(row.ids) for row in batch) or self.accelerator.num_processes > 1:
            raise LorakitError(
                "memory does not suffice; give --gradient-checkpointing, a smaller "
                "--micro-batch-tokens or --max-length"
            ) from error
        self.tokens //= 2
        self.note(f"out of memory: micro-batches of {self.tokens} tokens, bytes may differ")

    def _own(self, runs: list[list[Example]]) -> list[list[Example]]:
        """Return this process's share of the micro-batches."""
        return runs[self.accelerator.process_index :: self.accelerator.num_processes]

    def _loss(self, rows: Sequence[Example]) -> torch.Tensor:
        """Return the summed cross-entropy of the rows' completion tokens, in float32."""
        batch = lay_out(rows, self.base.device)
        self.norms.mask = batch.mask
        logits = completion_logits(self.base.model, batch).float()
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def _sum_gradients(self) -> None:
        for parameter in self.parameters:  # a module no token came through has none
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes == 1:
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = self._summed(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, summed in zip(
            gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
        ):
            gradient.copy_(summed.view_as(gradient))

    def _summed(self, value: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return value
        summed: torch.Tensor = self.accelerator.reduce(value, reduction="sum")
        return summed

    @torch.no_grad()
    def validate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over all completion tokens; refresh the input norms on the way."""
        total = torch.zeros((), dtype=torch.float64)
        with self._dropout(False), contextlib.ExitStack() as stack:
            if self.pruner is not None:
                stack.enter_context(self.norms.collecting())
            for rows in self._own(micro_batches(examples, self.tokens)):
                total += self._loss(rows).cpu()
        self.norms.update_(self._summed)
        summed = self._summed(total.to(torch.float32).to(self.base.device))
        return float(summed) / sum(row.targets for row in examples)

    @contextlib.contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Switch LoRA's dropout on (the frozen base keeps none), and checkpointing if wanted."""
        with contextlib.ExitStack() as stack:
            if self.settings.gradient_checkpointing:
                stack.enter_context(activation_checkpointing(self.base.model))
            stack.enter_context(self._dropout(True))
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
