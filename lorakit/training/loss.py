"""The exact mean loss of a batch, and its gradient, in micro-batches and over several processes.

A batch is cut into micro-batches of a fixed number of tokens, packed without padding if the base
allows it. The sum of their losses, divided by the number of completion tokens in the whole batch,
is its mean loss, however it was cut and over however many processes it was distributed. Optimisers,
epochs and pruning are not known here.

Vocabularies are large: PyTorch's own cross-entropy holds several float32 copies of all logits at
once. `cross_entropy` makes such copies of a few rows at a time and stores only the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar  # torch gives autograd functions an untyped context

import accelerate
import torch

from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.batches import (
    IGNORED,
    completion_logits,
    fill_packs,
    lay_out,
    micro_batches,
    pack,
    target_logits,
)
from lorakit.models.tokens import Example

T = TypeVar("T")

_LOGITS_AT_ONCE = 1 << 20  # converted to float32


def new_accelerator(device: str) -> accelerate.Accelerator:
    """Return the accelerator of this process, one of several under `accelerate launch` or torchrun.

    `device` is the type of the chosen device, never `auto`. Accelerate has to be told that this is
    a CPU: otherwise each of several processes believes that it is the only one.
    """
    return accelerate.Accelerator(cpu=device == "cpu")


class BatchLoss:
    """The cross-entropy of a base model on the completion tokens of batches of examples.

    `tokens` bounds a micro-batch. `watch` is called with the mask (rows, length) of each
    micro-batch, None if no row is padded, before its forward pass. Where memory runs out,
    micro-batches are halved from then on and all examples go through the model once more: `note` is
    called with a line about it, and `restart` so that what was collected up to then is dropped.
    """

    def __init__(
        self,
        base: Base,
        parameters: Sequence[torch.nn.Parameter],
        *,
        tokens: int,
        accelerator: accelerate.Accelerator,
    ) -> None:
        self.base = base
        self.parameters = parameters
        self.tokens = tokens
        self.accelerator = accelerator
        self.packed = base.packs
        self.note: Callable[[str], None] = lambda text: None
        self.watch: Callable[[torch.Tensor | None], None] = lambda mask: None
        self.restart: Callable[[], None] = lambda: None

    def backward(self, batch: Sequence[Example]) -> float:
        """Add up the gradient of the batch's mean loss over its completion tokens; return the loss.

        Raises LorakitError if memory does not suffice for a single example.
        """
        loss = self._in_memory(batch, lambda: self._add_gradients(batch))
        self._sum_gradients()
        return float(self.summed(loss))

    @torch.no_grad()
    def mean(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over all completion tokens of the examples.

        Raises LorakitError if memory does not suffice for a single example.
        """
        total = self._in_memory(examples, lambda: self._total(examples))
        summed = self.summed(total.to(torch.float32).to(self.base.device))
        return float(summed) / sum(row.targets for row in examples)

    @torch.no_grad()
    def means(self, examples: Sequence[Example]) -> list[float]:
        """Return the mean loss over the completion tokens of each example, in order.

        Raises LorakitError if memory does not suffice for a single example.
        """
        losses = self._in_memory(examples, lambda: self._by_example(examples))
        return [float(losses[id(example)]) for example in examples]

    def own_micro_batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Return the micro-batches that this process reads in `mean`, in order."""
        return self._own(self._cut(examples))

    @torch.no_grad()
    def read(self, rows: Sequence[Example]) -> None:
        """Run a micro-batch through the model for what watches it."""
        self._loss(rows)

    def summed(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a value over all processes; LorakitError where one has ended."""
        if self.accelerator.num_processes == 1:
            return value
        try:
            summed: torch.Tensor = self.accelerator.reduce(value, reduction="sum")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo's and NCCL's, of several lines
            raise LorakitError(
                "another process of this run has ended; see its message, then start all of them "
                "again, with --resume if there is a checkpoint"
            ) from error
        return summed

    def _in_memory(self, examples: Sequence[Example], compute: Callable[[], T]) -> T:
        """Return what `compute` returns, repeated in halved micro-batches while memory runs out."""
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError as error:
                self.halve_(examples, error)

    def _total(self, examples: Sequence[Example]) -> torch.Tensor:
        """Return this process's part of the examples' summed loss, () float64."""
        total = torch.zeros((), dtype=torch.float64)
        for rows in self._own(self._cut(examples)):
            total += self._loss(rows).cpu()
        self._keep_pace(self._cut(examples))
        return total

    def _by_example(self, examples: Sequence[Example]) -> dict[int, torch.Tensor]:
        """Return the mean loss of each example, by its id in this program."""
        losses: dict[int, torch.Tensor] = {}
        for rows in self._cut(examples):
            for row, loss in zip(rows, self._losses(rows), strict=True):
                losses[id(row)] = loss / row.targets
        return losses

    def _add_gradients(self, batch: Sequence[Example]) -> torch.Tensor:
        """Add this process's part of the gradient of the batch's mean loss; return its loss."""
        targets = sum(row.targets for row in batch)
        total = torch.zeros((), device=self.base.device)
        for rows in self._own(self._cut(batch)):
            loss = self._loss(rows) / targets
            loss.backward()
            total += loss.detach()
        self._keep_pace(self._cut(batch))
        return total

    def _keep_pace(self, runs: list[list[Example]]) -> None:
        """Run a sharded base as often as the process that has the most of the micro-batches.

        What is computed counts for nothing: no token of it is watched, and its gradient is zero.
        """
        if not self.base.sharded:
            return
        most = -(-len(runs) // self.accelerator.num_processes)
        row, watch = runs[0][:1], self.watch
        hidden = torch.zeros(len(row[0].ids) - 1, dtype=torch.bool, device=self.base.device)
        self.watch = lambda mask: watch(hidden)
        for _ in range(most - len(self._own(runs))):
            loss = self._loss(row)
            if loss.requires_grad:
                (0 * loss).backward()
        self.watch = watch

    def halve_(self, batch: Sequence[Example], error: torch.OutOfMemoryError) -> None:
        """Halve the micro-batches and drop what is half done, or raise LorakitError."""
        for parameter in self.parameters:
            parameter.grad = None
        if self.tokens <= max(len(row.ids) for row in batch) or self.accelerator.num_processes > 1:
            raise LorakitError(
                "memory does not suffice; give --gradient-checkpointing, a smaller "
                "--micro-batch-tokens or --max-length"
            ) from error
        self.restart()
        self.tokens //= 2
        self.note(f"out of memory: micro-batches of {self.tokens} tokens, bytes may differ")

    def _cut(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Return the examples in micro-batches; if packed, at least one for every process."""
        if self.packed:
            return fill_packs(examples, self.tokens, at_least=self.accelerator.num_processes)
        return micro_batches(examples, self.tokens)

    def _own(self, runs: list[list[Example]]) -> list[list[Example]]:
        """Return this process's share of the micro-batches."""
        return runs[self.accelerator.process_index :: self.accelerator.num_processes]

    def _loss(self, rows: Sequence[Example]) -> torch.Tensor:
        """Return the summed cross-entropy of the rows' completion tokens, in float32."""
        return self._losses(rows).sum()

    def _losses(self, rows: Sequence[Example]) -> torch.Tensor:
        """Return the summed cross-entropy of each row's completion tokens: (rows,) float32."""
        if self.packed:
            packed = pack(rows, self.base.device)
            self.watch(None)
            logits = target_logits(self.base.model, packed)
            losses = cross_entropy(logits, packed.labels, ignored=IGNORED)
            by_row = losses.split([row.targets for row in rows])
            return torch.stack([of_row.sum() for of_row in by_row])
        batch = lay_out(rows, self.base.device)
        self.watch(batch.mask)
        logits = completion_logits(self.base.model, batch).flatten(0, 1)
        losses = cross_entropy(logits, batch.labels.flatten(), ignored=IGNORED)
        return losses.view_as(batch.labels).sum(1)

    def _sum_gradients(self) -> None:
        """Sum the gradients of all processes; those of unused modules become zero."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = self.summed(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, summed in zip(
            gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
        ):
            gradient.copy_(summed.view_as(gradient))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, ignored: int) -> torch.Tensor:
    """Return −log softmax(logits)[label] of each row, 0 where the label is `ignored`.

    logits (rows, vocabulary) in any floating dtype; labels (rows,) int64; the result (rows,)
    float32.
    """
    losses: torch.Tensor = _CrossEntropy.apply(logits, labels, ignored)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    """`cross_entropy`, whose probabilities are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> torch.Tensor:
        counted = labels != ignored
        places = labels.where(counted, 0)[:, None]
        sums = torch.cat([part.float().logsumexp(1) for part in _parts(logits)])
        ctx.save_for_backward(logits, places, counted, sums)
        return (sums - logits.gather(1, places)[:, 0].float()).where(counted, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, places, counted, sums = ctx.saved_tensors
        due = (grad * counted)[:, None]
        gradient = torch.empty_like(logits)
        start = 0
        for part in _parts(logits):
            rows = slice(start, start + len(part))
            own = (part.float() - sums[rows, None]).exp_().mul_(due[rows])
            own.scatter_add_(1, places[rows], -due[rows])
            gradient[rows] = own
            start += len(part)
        return gradient, None, None


def _parts(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return runs of rows with at most _LOGITS_AT_ONCE logits, or of one row."""
    parts: tuple[torch.Tensor, ...] = logits.split(max(1, _LOGITS_AT_ONCE // logits.shape[1]))
    return parts
