"""The norms of the inputs of A and B, collected while the validation set runs through the model.

For every feature k of a projection's input x: ‖x_k‖₂ over all tokens that are not padding (Wanda's
norm; section 3.2), and likewise ‖(A·x)_k‖₂. A hook on PEFT's lora_A sees both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from lorakit.models.lora import ADAPTER, PeftLayer
from lorakit.training.loss import BatchLoss, Blind
from lorakit.training.step_hook import State, StepHook

_KINDS = ("x", "ax", "tokens")  # the names of the sums in a checkpoint
_ForwardHook = Callable[[torch.nn.Module, tuple[torch.Tensor], torch.Tensor], None]


class _Sums(NamedTuple):
    """Sums over the tokens that reached a module: squares of x (d_in,), of A·x (rank,), and ()."""

    of_x: torch.Tensor
    of_ax: torch.Tensor
    tokens: torch.Tensor

    def plus(self, other: _Sums) -> _Sums:
        """Return the sums over the tokens of both."""
        return _Sums(*(mine + more for mine, more in zip(self, other, strict=True)))


class InputNorms(StepHook):
    """Sums of squares by module: of x, (d_in,), and of A·x, (rank,), and how many tokens they hold.

    They are collected afresh in every pass over the validation set: before training, after every
    epoch and, if `every` is set, every `every` optimiser steps. `version` counts the passes.
    """

    name = "input_norms"

    def __init__(self, layers: Mapping[str, PeftLayer], *, every: int | None = None) -> None:
        self._layers = layers
        self._every = every
        self._sums: dict[str, _Sums] = {}
        self._parts: dict[str, _Sums] = {}  # of the current micro-batch
        self._mask: torch.Tensor | None = None  # (rows, length) of the current micro-batch
        self.version = 0

    def norms(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ‖x_k‖₂, (d_in,), and ‖(A·x)_k‖₂, (rank,), of a module."""
        of_x, of_ax, _ = self._sums[module]
        return of_x.sqrt(), of_ax.sqrt()

    def root_of_tokens(self, module: str) -> torch.Tensor:
        """Return √(number of tokens) of a module, (): over it, a norm is a root mean square."""
        return self._sums[module].tokens.clamp_min(1).sqrt()

    def is_validation_due(self, step: int) -> bool:
        """Return whether there are no norms yet, or `every` steps have passed."""
        return not self.version or bool(step and self._every and step % self._every == 0)

    @contextlib.contextmanager
    def around_validation(self, losses: BatchLoss) -> Iterator[None]:
        """Collect from every forward pass inside the block.

        Where the block ends with an error, the norms stay those of the pass before.
        """
        before = self._sums
        self.restart()
        losses.watcher = self
        handles = [
            layer.lora_A[ADAPTER].register_forward_hook(self._noting(name), prepend=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield
        except BaseException:
            self._sums = before
            raise
        finally:
            losses.watcher = Blind()
            for handle in handles:
                handle.remove()
        self.version += 1

    def state(self) -> State:
        """Return the sums, by module."""
        return {
            f"{kind}.{name}": value
            for name, sums in self._sums.items()
            for kind, value in zip(_KINDS, sums, strict=True)
        }

    def restore_(self, state: State) -> None:
        """Restore the sums, which may come from another run with the same weights."""
        for name, layer in self._layers.items():
            device = layer.lora_A[ADAPTER].weight.device
            self._sums[name] = _Sums(*(state[f"{kind}.{name}"].to(device) for kind in _KINDS))
        self.version += 1

    def restart(self) -> None:
        """Begin the sums anew."""
        self._sums = {name: _zeros(layer) for name, layer in self._layers.items()}

    def expect(self, mask: torch.Tensor | None) -> None:
        """Take the mask of the next micro-batch."""
        self._mask = mask
        self._parts = {}

    def parts(self) -> list[torch.Tensor]:
        """Return the sums of the micro-batch just read, of every module in order."""
        layers = self._layers.items()
        by_module = (self._parts.get(name) or _zeros(layer) for name, layer in layers)
        return [value for sums in by_module for value in sums]

    def add(self, parts: Sequence[torch.Tensor]) -> None:
        """Add what `parts` returned to the sums."""
        values = iter(parts)
        self._sums = {
            name: sums.plus(_Sums(next(values), next(values), next(values)))
            for name, sums in self._sums.items()
        }

    def _noting(self, name: str) -> _ForwardHook:
        """Return the hook that notes the squares of one forward pass of a module."""

        def note(
            module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
        ) -> None:
            x, ax = self._unpadded(inputs[0]), self._unpadded(output)
            sums = _Sums(x.float().square().sum(0), ax.float().square().sum(0), _count(x))
            before = self._parts.get(name)
            self._parts[name] = sums if before is None else before.plus(sums)

        return note

    def _unpadded(self, values: torch.Tensor) -> torch.Tensor:
        """Return the features (tokens, features) of the tokens that are not padding."""
        flat = values.detach().flatten(0, -2)
        return flat if self._mask is None else flat[self._mask.flatten()]


def _count(rows: torch.Tensor) -> torch.Tensor:
    """Return the number of rows, () float32."""
    return rows.new_tensor(float(len(rows)), dtype=torch.float32)


def _zeros(layer: PeftLayer) -> _Sums:
    """Return empty sums for a module."""
    weight = layer.lora_A[ADAPTER].weight
    rank, width = weight.shape
    return _Sums(weight.new_zeros(width), weight.new_zeros(rank), weight.new_zeros(()))
