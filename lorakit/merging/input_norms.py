"""The norms of what LoRA's matrices read, collected while the validation set passes through.

‖x_k‖₂ for every feature k of a projection's input x, and of A·x, over all tokens that are not
padding (Wanda's norm). Hooks on PEFT's lora_A see both; they are removed at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from lorakit.models.base import ADAPTER


class InputNorms:
    """Running sums of squares, by module: of x (d_in,) and of A·x (rank,)."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self._layers = layers
        self._squares: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.version = 0  # counts the calibrations
        self.mask: torch.Tensor | None = None  # (rows, length) of the micro-batch under way

    @contextlib.contextmanager
    def collecting(self) -> Iterator[InputNorms]:
        """Start from zero and collect from every forward pass made inside the block."""
        self._squares = {name: _zeros(layer) for name, layer in self._layers.items()}
        hooks = [
            layer.lora_A[ADAPTER].register_forward_hook(self._hook(name), prepend=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def take_mask(self, mask: torch.Tensor | None) -> None:
        """Learn which positions of the micro-batch under way are not padding."""
        self.mask = mask

    def take_over_(self, other: InputNorms) -> None:
        """Start from the norms that another run over the same weights has collected."""
        self._squares, self.version = dict(other._squares), other.version

    def _hook(self, name: str) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            of_x, of_ax = self._squares[name]
            self._squares[name] = of_x + self._sum(inputs[0]), of_ax + self._sum(output)

        return add

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        flat = values.detach().flatten(0, -2)
        if self.mask is not None:
            flat = flat[self.mask.flatten()]
        return flat.float().square().sum(0)

    def update_(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every sum by `change` of it, in a fixed order (a sum over processes, say)."""
        for name, (of_x, of_ax) in self._squares.items():
            self._squares[name] = change(of_x), change(of_ax)
        self.version += 1

    def norms(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ‖x_k‖₂ (d_in,) and ‖(A·x)_k‖₂ (rank,) of a module."""
        of_x, of_ax = self._squares[name]
        return of_x.sqrt(), of_ax.sqrt()


def _zeros(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    weight = layer.lora_A[ADAPTER].weight
    return weight.new_zeros(weight.shape[1]), weight.new_zeros(weight.shape[0])
