"""The exact mean loss of a batch, and its gradient, in micro-batches and over several processes.

A batch is cut into micro-batches of a fixed number of tokens, packed without padding if the base
allows it. The sum of their losses, divided by the number of completion tokens in the whole batch,
is its mean loss, however it was cut and over however many processes it was distributed. Optimisers,
epochs and pruning are not known here.

Vocabularies are large: PyTorch's own cross-entropy holds several float32 copies of all logits at
once. `cross_entropy` makes such copies of a few rows at a time and stores only the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar  # torch gives autograd functions an untyped context

import accelerate
import torch

from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.batches import (
    IGNORED,
    completion_logits,
    cut_into_runs,
    lay_out,
    pack,
    target_logits,
    tokens_at_once,
)
from lorakit.models.fixed_order import backward_pass
from lorakit.models.sharing import ALONE, team_of
from lorakit.models.tokens import Example

T = TypeVar("T")

_LOGITS_AT_ONCE = 1 << 20  # converted to float32 on a CPU, where they stay in its cache
_LOGITS_AT_ONCE_ON_GPU = 1 << 24


class Watcher(Protocol):
    """Sums something up over the forward passes of a BatchLoss, a micro-batch at a time."""

    def expect(self, mask: torch.Tensor | None) -> None:
        """Take the mask (rows, length) of the next micro-batch, None if no row is padded."""

    def parts(self) -> list[torch.Tensor]:
        """Return what the micro-batch just read adds to the sums, of the same shapes for all."""
        ...

    def add(self, parts: Sequence[torch.Tensor]) -> None:
        """Add what `parts` returned, on this or another process, to the sums."""

    def restart(self) -> None:
        """Drop the sums: all micro-batches are read once more."""


class Blind:
    """A Watcher that sums up nothing."""

    def expect(self, mask: torch.Tensor | None) -> None:
        pass

    def parts(self) -> list[torch.Tensor]:
        return []

    def add(self, parts: Sequence[torch.Tensor]) -> None:
        pass

    def restart(self) -> None:
        pass


class BatchLoss:
    """The cross-entropy of a base model on the completion tokens of batches of examples.

    `tokens` bounds a micro-batch, by default as suits the device; `watcher` sees each in `mean` and
    `read`. Several processes share the micro-batches out, and each gets the sums of one process.
    Where memory runs out, micro-batches are halved from then on and all examples go through the
    model once more: `note` is called with a line about it.
    """

    def __init__(
        self,
        base: Base,
        parameters: Sequence[torch.nn.Parameter],
        *,
        tokens: int | None,
        accelerator: accelerate.Accelerator,
    ) -> None:
        self.base = base
        self.parameters = parameters
        self.tokens = tokens_at_once(tokens, base.device)
        self.accelerator = accelerator
        self.team = team_of(accelerator)
        self.packed = base.packs
        self.note: Callable[[str], None] = lambda text: None
        self.watcher: Watcher = Blind()

    def backward(self, batch: Sequence[Example]) -> torch.Tensor:
        """Add up the gradient of the batch's mean loss over its completion tokens; return the loss.

        It is () float32, on the base's device, which need not have computed it yet. Raises
        LorakitError if memory does not suffice for a single example.
        """
        loss = self._in_memory(batch, lambda: self._add_gradients(batch))
        for parameter in self.parameters:  # those of unused modules
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return loss

    @torch.no_grad()
    def mean(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over all completion tokens of the examples.

        Raises LorakitError if memory does not suffice for a single example.
        """
        total = self._in_memory(examples, lambda: self._total(examples))
        return float(total.to(torch.float32)) / sum(row.targets for row in examples)

    @torch.no_grad()
    def means(self, examples: Sequence[Example]) -> list[float]:
        """Return the mean loss over the completion tokens of each example, in order.

        Raises LorakitError if memory does not suffice for a single example.
        """
        losses = self._in_memory(examples, lambda: self._by_example(examples))
        return [losses[id(example)] for example in examples]

    def micro_batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Return the micro-batches that examples are read in, which processes take in turn."""
        return cut_into_runs(examples, self.tokens, packed=self.packed)

    @torch.no_grad()
    def read(self, runs: Sequence[Sequence[Example]]) -> None:
        """Run micro-batches through the model for what watches it."""
        for _ in self._losses_of(runs):
            pass

    def _in_memory(self, examples: Sequence[Example], compute: Callable[[], T]) -> T:
        """Return what `compute` returns, repeated in halved micro-batches while memory runs out."""
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError as error:
                self.halve_(examples, error)

    def _total(self, examples: Sequence[Example]) -> torch.Tensor:
        """Return the examples' summed loss, () float64."""
        total = torch.zeros((), dtype=torch.float64)
        for loss in self._losses_of(self.micro_batches(examples)):
            total += loss.cpu()
        return total

    def _losses_of(self, runs: Sequence[Sequence[Example]]) -> Iterator[torch.Tensor]:
        """Yield the summed loss of every micro-batch, () float32, once the watcher has seen it."""

        def compute(rows: Sequence[Example]) -> list[torch.Tensor]:
            return [self._loss(rows), *self.watcher.parts()]

        for loss, *parts in self.team.tensors_in_turn(runs, compute):
            self.watcher.add(parts)
            yield loss

    def _by_example(self, examples: Sequence[Example]) -> dict[int, float]:
        """Return the mean loss of each example, by its id in this program."""

        def compute(rows: Sequence[Example]) -> list[float]:
            losses = self._losses(rows)
            return [float(loss / row.targets) for row, loss in zip(rows, losses, strict=True)]

        runs = self.micro_batches(examples)
        team = ALONE if self.base.sharded else self.team  # all have to run the base equally often
        return {
            id(row): mean
            for rows, means in zip(runs, team.in_turn(runs, compute), strict=True)
            for row, mean in zip(rows, means, strict=True)
        }

    def _add_gradients(self, batch: Sequence[Example]) -> torch.Tensor:
        """Add the gradient of the batch's mean loss to the parameters'; return the loss.

        Each process's gradient of a micro-batch is added in its turn, as one process adds them.
        """
        targets = sum(row.targets for row in batch)
        total = torch.zeros((), device=self.base.device)
        sums: list[torch.Tensor] = []

        def compute(rows: Sequence[Example]) -> list[torch.Tensor]:
            loss = self._loss(rows) / targets
            with backward_pass():
                loss.backward()
            return [loss.detach(), *(self._take_gradients() if self.team.count > 1 else ())]

        for loss, *gradients in self.team.tensors_in_turn(self.micro_batches(batch), compute):
            total += loss
            sums = [a.add_(b) for a, b in zip(sums, gradients, strict=True)] if sums else gradients
        if self.team.count > 1:
            for parameter, gradient in zip(self.parameters, sums, strict=True):
                parameter.grad = gradient
        return total

    def _take_gradients(self) -> Iterator[torch.Tensor]:
        """Yield the gradients, which the parameters lose: zeros where a module was not used."""
        for parameter in self.parameters:
            gradient = parameter.grad
            parameter.grad = None
            yield torch.zeros_like(parameter) if gradient is None else gradient

    def halve_(self, batch: Sequence[Example], error: torch.OutOfMemoryError) -> None:
        """Halve the micro-batches and drop what is half done, or raise LorakitError."""
        for parameter in self.parameters:
            parameter.grad = None
        if self.tokens <= max(len(row.ids) for row in batch) or self.team.count > 1:
            raise LorakitError(
                "memory does not suffice; give --gradient-checkpointing, a smaller "
                "--micro-batch-tokens or --max-length"
            ) from error
        self.watcher.restart()
        self.tokens //= 2
        self.note(f"out of memory: micro-batches of {self.tokens} tokens, bytes may differ")

    def _loss(self, rows: Sequence[Example]) -> torch.Tensor:
        """Return the summed cross-entropy of the rows' completion tokens, in float32."""
        return self._losses(rows).sum()

    def _losses(self, rows: Sequence[Example]) -> torch.Tensor:
        """Return the summed cross-entropy of each row's completion tokens: (rows,) float32."""
        if self.packed:
            packed = pack(rows, self.base.device)
            self.watcher.expect(None)
            logits = target_logits(self.base.model, packed)
            losses = cross_entropy(logits, packed.labels, ignored=IGNORED)
            by_row = losses.split([row.targets for row in rows])
            return torch.stack([of_row.sum() for of_row in by_row])
        batch = lay_out(rows, self.base.device)
        self.watcher.expect(batch.mask)
        logits = completion_logits(self.base.model, batch).flatten(0, 1)
        losses = cross_entropy(logits, batch.labels.flatten(), ignored=IGNORED)
        return losses.view_as(batch.labels).sum(1)


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
    """Return runs of rows of as many logits as are converted at once, or of one row."""
    at_once = _LOGITS_AT_ONCE_ON_GPU if logits.device.type == "cuda" else _LOGITS_AT_ONCE
    parts: tuple[torch.Tensor, ...] = logits.split(max(1, at_once // logits.shape[1]))
    return parts
