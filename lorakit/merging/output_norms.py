"""The sizes of LoRA's outputs on some data: the mean of ‖ΔW·x‖² over tokens (LoRA-drop).

A hook on PEFT's lora_B sees B·A·x; s of ΔW = s·B·A is applied afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.models.base import Base
from lorakit.models.lora import ADAPTER, attach
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.settings import TrainingSettings
from lorakit.training.loss import BatchLoss

_ForwardHook = Callable[[torch.nn.Module, tuple[torch.Tensor], torch.Tensor], None]


def mean_outputs(
    base: Base, adapter: Adapter, examples: Sequence[Example], *, settings: TrainingSettings
) -> dict[str, float]:
    """Return, by module, the mean of ‖ΔW·x‖² over the tokens of prompts and completions.

    The tokens are those that the model reads: all but the last of each example. The adapter is put
    on the base and stays there. Raises LorakitError if it does not fit.
    """
    layers = attach(base, adapter)
    losses = BatchLoss(
        base, [], tokens=settings.micro_batch_tokens, accelerator=new_accelerator(base.device.type)
    )
    losses.watcher = sums = _SquareSums(layers, base.device)
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.lora_B[ADAPTER].register_forward_hook(sums.adding_to(name))
            hooks.callback(hook.remove)
        losses.mean(examples)
    count = sum(len(example.ids) - 1 for example in examples)
    return {
        name: float(sums.by_module[name]) * layer.scaling[ADAPTER] ** 2 / count
        for name, layer in layers.items()
    }


class _SquareSums:
    """‖B·A·x‖² by module, summed in float32 over the tokens that are not padding."""

    def __init__(self, modules: Iterable[str], device: torch.device) -> None:
        self._nothing = dict.fromkeys(modules, torch.zeros((), device=device))
        self._mask: torch.Tensor | None = None  # (rows, length) of the current micro-batch
        self._parts: dict[str, torch.Tensor] = {}  # its sums
        self.restart()

    def restart(self) -> None:
        self.by_module = dict(self._nothing)

    def expect(self, mask: torch.Tensor | None) -> None:
        self._mask, self._parts = mask, dict(self._nothing)

    def parts(self) -> list[torch.Tensor]:
        return list(self._parts.values())

    def add(self, parts: Sequence[torch.Tensor]) -> None:
        sums = zip(self.by_module.items(), parts, strict=True)
        self.by_module = {name: total + part for (name, total), part in sums}

    def adding_to(self, name: str) -> _ForwardHook:
        """Return the hook that adds the squares of one forward pass to a module's sum."""

        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            squares = output.detach().float().square().sum(-1).flatten()
            if self._mask is not None:
                squares = squares[self._mask.flatten()]
            self._parts[name] = self._parts[name] + squares.sum()

        return add
