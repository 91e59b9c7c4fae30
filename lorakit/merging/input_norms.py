"""The norms of the inputs of A and B, collected while the validation set runs through the model.

For every feature k of a projection's input x: ‖x_k‖₂ over all tokens that are not padding (Wanda's
norm; section 3.2), and likewise ‖(A·x)_k‖₂. A hook on PEFT's lora_A sees both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch

from lorakit.models.lora import ADAPTER, PeftLayer
from lorakit.training.loss import BatchLoss
from lorakit.training.trainer import State, StepHook

_ForwardHook = Callable[[torch.nn.Module, tuple[torch.Tensor], torch.Tensor], None]


class InputNorms(StepHook):
    """Sums of squares by module: of x, (d_in,), and of A·x, (rank,).

    They are collected afresh in every pass over the validation set: before training, after every
    epoch and, if `every` is set, every `every` optimiser steps. `version` counts the passes.
    """

    name = "input_norms"

    def __init__(self, layers: Mapping[str, PeftLayer], *, every: int | None = None) -> None:
        self._layers = layers
        self._every = every
        self._squares: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._mask: torch.Tensor | None = None  # (rows, length) of the current micro-batch
        self.version = 0

    def norms(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ‖x_k‖₂, (d_in,), and ‖(A·x)_k‖₂, (rank,), of a module."""
        of_x, of_ax = self._squares[module]
        return of_x.sqrt(), of_ax.sqrt()

    def is_validation_due(self, step: int) -> bool:
        """Return whether there are no norms yet, or `every` steps have passed."""
        return not self.version or bool(step and self._every and step % self._every == 0)

    @contextlib.contextmanager
    def around_validation(self, losses: BatchLoss) -> Iterator[None]:
        """Collect from every forward pass inside the block; then sum over all processes."""
        self._squares = {name: _zeros(layer) for name, layer in self._layers.items()}
        losses.watch = self._take_mask
        handles = [
            layer.lora_A[ADAPTER].register_forward_hook(self._adding_to(name), prepend=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for name, (of_x, of_ax) in self._squares.items():
            self._squares[name] = losses.summed(of_x), losses.summed(of_ax)
        self.version += 1

    def state(self) -> State:
        """Return the sums of squares, by module."""
        squares = self._squares.items()
        return {
            **{f"x.{name}": of_x for name, (of_x, _) in squares},
            **{f"ax.{name}": of_ax for name, (_, of_ax) in squares},
        }

    def restore_(self, state: State) -> None:
        """Restore the sums, which may come from another run with the same weights."""
        for name, layer in self._layers.items():
            device = layer.lora_A[ADAPTER].weight.device
            self._squares[name] = state[f"x.{name}"].to(device), state[f"ax.{name}"].to(device)
        self.version += 1

    def _take_mask(self, mask: torch.Tensor | None) -> None:
        self._mask = mask

    def _adding_to(self, name: str) -> _ForwardHook:
        """Return the hook that adds the squares of one forward pass to a module's sums."""

        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            of_x, of_ax = self._squares[name]
            self._squares[name] = of_x + self._sum(inputs[0]), of_ax + self._sum(output)

        return add

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of squares of each feature over the tokens that are not padding."""
        flat = values.detach().flatten(0, -2)
        if self._mask is not None:
            flat = flat[self._mask.flatten()]
        return flat.float().square().sum(0)


def _zeros(layer: PeftLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty sums for x (d_in,) and A·x (rank,)."""
    weight = layer.lora_A[ADAPTER].weight
    return weight.new_zeros(weight.shape[1]), weight.new_zeros(weight.shape[0])
