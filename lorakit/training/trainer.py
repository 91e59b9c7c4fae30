"""The training loop: LoRA weights on a frozen base, one exact optimiser step after another.

A trainer can stop after any step and go on to the same bytes, so that runs can be paused and
resumed. Anything else that happens around a step, such as pruning, is done by a StepHook. Losses
and gradients are in loss.py; where weights and examples come from, and what becomes of the result,
is not known here.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import accelerate
import torch

from lorakit.errors import LorakitError
from lorakit.models.architecture import activation_checkpointing
from lorakit.models.base import Base
from lorakit.models.batches import epoch_batches
from lorakit.models.gpu_kernels import why_no_kernels
from lorakit.models.lora import PeftLayer, trained
from lorakit.models.tokens import Example
from lorakit.reporting import EpochReport, Reporter, StepReport
from lorakit.runs.signals import deferred
from lorakit.settings import TrainingSettings
from lorakit.training.lora_step import lean_passes, switch_dropout
from lorakit.training.loss import BatchLoss
from lorakit.training.progress import Progress
from lorakit.training.schedule import learning_rate_factor
from lorakit.training.step_hook import State, StepHook

# What is trained, by module: A (rank, d_in) and B (d_out, rank), or the weights of blocks alone.
Weights = dict[str, tuple[torch.Tensor, ...]]
Measure = Callable[[], float]


class Trainer:
    """One training run over the LoRA of a base; `layers` are PEFT's layers by module name.

    Hooks act in the order of `hooks`. `measure` returns the value, higher is better, by which
    epochs are compared (`--select-by`); None compares them by the validation loss.
    """

    def __init__(
        self,
        base: Base,
        layers: Mapping[str, PeftLayer],
        settings: TrainingSettings,
        *,
        accelerator: accelerate.Accelerator,
        hooks: Sequence[StepHook] = (),
        measure: Measure | None = None,
    ) -> None:
        self.base = base
        self.layers = layers
        self.settings = settings
        self.accelerator = accelerator
        self.hooks = hooks
        self.measure = measure
        self.progress = Progress()
        self.is_between_steps = True  # else weights may be ahead of `progress`
        self.parameters = [
            weight for layer in layers.values() for weight in trained(layer).values()
        ]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.losses = BatchLoss(
            base, self.parameters, tokens=settings.micro_batch_tokens, accelerator=accelerator
        )
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            fused=base.device.type == "cuda" or None,  # None: as torch finds best
        )
        self.best = self.weights()
        self._seconds = 0.0  # spent on the steps of the current epoch

    def weights(self) -> Weights:
        """Return a copy of what is trained, by module, on the CPU."""
        return {
            name: tuple(weight.detach().cpu().clone() for weight in trained(layer).values())
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def load_weights_(self, weights: Weights) -> None:
        """Copy what `weights` returned into the model."""
        for name, layer in self.layers.items():
            for parameter, value in zip(trained(layer).values(), weights[name], strict=True):
                parameter.copy_(value)

    def hook_states(self) -> dict[str, State]:
        """Return every hook's state, by the hook's name."""
        return {hook.name: hook.state() for hook in self.hooks}

    def restore_hooks_(self, states: Mapping[str, State]) -> None:
        """Restore each hook's state; a hook without one in `states` stays as it is."""
        for hook in self.hooks:
            if hook.name in states:
                hook.restore_(states[hook.name])

    def begin(
        self, examples: Sequence[Example], validation: Sequence[Example], reporter: Reporter
    ) -> None:
        """Set the data and the reporter, and validate first if a hook asks for it."""
        self._examples, self._validation, self._reporter = examples, validation, reporter
        for hook in self.hooks:
            hook.begin(self._steps_an_epoch)
        self.losses.note = reporter.note
        if reason := why_no_kernels(self.base.device, self.base.dtype):
            reporter.note(f"without Triton's kernels a step takes longer ({reason})")
        reporter.start(self.steps, self.settings.epochs, self.progress.step)
        self.progress.validation_due |= self._asks_for_validation(0)
        self._validate_if_due()

    def train(
        self,
        examples: Sequence[Example],
        validation: Sequence[Example],
        reporter: Reporter,
        *,
        every: int | None = None,
    ) -> Iterator[Progress]:
        """Train to the last epoch, or until `patience` epochs in a row were no better.

        Yields after every epoch, and after every `every` steps, so that the caller can save a
        checkpoint. At the end `best` holds the weights of the epoch that `--keep` asks for. Raises
        LorakitError if a loss is not finite.
        """
        self.begin(examples, validation, reporter)
        while not self.is_done:
            self.advance(self.next_multiple(every))
            yield self.progress
        self.check_best()
        for note in self.notes():
            reporter.note(note)

    def check_best(self) -> None:
        """Raise LorakitError if the epoch to keep had no finite validation loss."""
        if not self.has_result:
            which = "the last epoch had no" if self._keeps_last else "no epoch had a"
            raise LorakitError(f"{which} finite validation loss; lower --lr")

    @property
    def has_result(self) -> bool:
        """Whether `best` holds the weights of the epoch that `--keep` asks for, of those so far."""
        return self.progress.has_result(last=self._keeps_last)

    @property
    def _keeps_last(self) -> bool:
        return self.settings.keep == "last"

    @property
    def best_step(self) -> int:
        """The number of optimiser steps after which `best` was copied."""
        return self.progress.best_epoch * self._steps_an_epoch

    def notes(self) -> list[str]:
        """Return what the hooks have to tell the user at the end of the run."""
        return [note for hook in self.hooks for note in hook.notes()]

    @property
    def steps(self) -> int:
        """The number of optimiser steps in all epochs."""
        return self.settings.epochs * self._steps_an_epoch

    @property
    def _steps_an_epoch(self) -> int:
        return math.ceil(len(self._examples) / self.settings.batch_size)

    @property
    def is_done(self) -> bool:
        """Whether the last epoch is over, or `patience` epochs in a row were no better.

        With `--keep last` the latter does not count.
        """
        progress, settings = self.progress, self.settings
        is_stale = progress.stale >= settings.patience and not self._keeps_last
        return progress.epoch >= settings.epochs or is_stale

    def advance(self, until: int | None = None) -> None:
        """Train to the end of the current epoch and validate, or only to step `until`.

        Ctrl-C and SIGTERM end it between two steps, never within one, so that `progress` is always
        what has been done.
        """
        progress = self.progress
        order = list(self._batches(progress.epoch + 1))
        with self._training_mode():
            for batch in order[progress.step - progress.epoch * len(order) :]:
                if progress.step == until:
                    return
                with deferred():
                    self._take(batch)
                self._validate_if_due()
        if progress.step < (progress.epoch + 1) * len(order):
            return
        self._end_epoch()

    def next_multiple(self, every: int | None) -> int | None:
        """Return the next step that is a multiple of `every`; None for None."""
        return None if every is None else (self.progress.step // every + 1) * every

    def _take(self, batch: Sequence[Example]) -> None:
        """Take an optimiser step on a batch, report it, and ask the hooks what they wait for."""
        started, step = time.perf_counter(), self.progress.step + 1
        report = self._step(batch, self.steps)
        self.progress.validation_due = self._asks_for_validation(step)
        self._reporter.step(report)
        self._seconds += time.perf_counter() - started

    def _batches(self, epoch: int) -> Iterator[list[Example]]:
        return epoch_batches(self._examples, self.settings.batch_size, self.settings.seed, epoch)

    def _end_epoch(self) -> None:
        """Validate, keep the weights if `--keep` asks for them so far, and report the epoch."""
        loss = self.validate(self._validation)
        value = -loss if self.measure is None else self.value()
        with deferred():
            self._close_epoch(value, loss)

    def _close_epoch(self, value: float, loss: float) -> None:
        """Count the epoch with its value and validation loss, keep its weights, and report it."""
        progress = self.progress
        progress.epoch += 1
        is_best = progress.is_best(value, loss, last=self._keeps_last)
        if is_best or (self._keeps_last and math.isfinite(loss)):
            progress.keep(value, loss)
            self.best = self.weights()
        progress.highest_value = max(progress.highest_value, value)
        report = EpochReport(
            epoch=progress.epoch,
            step=progress.step,
            train_loss=progress.loss_sum / progress.targets,
            validation_loss=loss,
            best=is_best,
            seconds=round(self._seconds, 3),
            validation_score=None if self.measure is None else value,
        )
        progress.loss_sum, progress.targets, self._seconds = 0.0, 0, 0.0
        self._reporter.epoch(report)

    def value(self, measure: Measure | None = None) -> float:
        """Return the value of the model's weights, higher is better, the same on every process.

        `measure` defaults to the trainer's own, and that to the negative validation loss.
        """
        measure = measure or self.measure
        with switch_dropout(self.layers, on=False):
            value = float(measure() if measure else -self.losses.mean(self._validation))
        return self.losses.team.from_first(value)

    def _asks_for_validation(self, step: int) -> bool:
        return any(hook.is_validation_due(step) for hook in self.hooks)

    def _validate_if_due(self) -> None:
        if self.progress.validation_due:
            self.validate(self._validation)
            self.progress.validation_due = False

    def _step(self, batch: Sequence[Example], steps: int) -> StepReport:
        """Take one of `steps` optimiser steps, on a batch."""
        started, progress = time.perf_counter(), self.progress
        torch.manual_seed(
            self.settings.seed * 1_000_003 + progress.step * 1_009 + self.accelerator.process_index
        )
        batch_loss = self.losses.backward(batch)
        for hook in self.hooks:
            hook.before_clipping()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.is_between_steps = False
        rate = self._update_weights_(steps)
        progress.step += 1
        for hook in self.hooks:
            hook.after_step(progress.step)
        loss = float(batch_loss)  # waits for a GPU, to which all of the step has now been given
        if not math.isfinite(loss):
            raise LorakitError(
                f"the loss is {loss} at step {progress.step}; lower --lr or use --dtype float32"
            )
        targets = sum(row.targets for row in batch)
        progress.loss_sum += loss * targets
        progress.targets += targets
        self.is_between_steps = True
        tokens = sum(len(row.ids) for row in batch)
        return StepReport(
            step=progress.step,
            epoch=progress.epoch + 1,
            train_loss=loss,
            lr=rate,
            grad_norm=float(norm),
            tokens_per_second=round(tokens / (time.perf_counter() - started), 1),
            measurements={
                name: value for hook in self.hooks for name, value in hook.measurements().items()
            },
        )

    def _update_weights_(self, steps: int) -> float:
        """Apply the gradients at the step's learning rate, and return that."""
        settings = self.settings
        rate = settings.lr * learning_rate_factor(
            settings.schedule, self.progress.step, steps, settings.warmup
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return rate

    def validate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over all completion tokens, within every hook's context."""
        with switch_dropout(self.layers, on=False), contextlib.ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook.around_validation(self.losses))
            return self.losses.mean(examples)

    @contextlib.contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Inside the block, LoRA's dropout is on (the base has none), and checkpointing if set."""
        with contextlib.ExitStack() as stack:
            if self.settings.gradient_checkpointing:
                stack.enter_context(activation_checkpointing(self.base.model))
            stack.enter_context(switch_dropout(self.layers, on=True))
            stack.enter_context(lean_passes(self.base.model, self.layers))
            yield
