"""Settings of training, pruning and generation: the only place where a default is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any

SCHEDULES = ("linear", "cosine", "constant")
_UNTOLD = ("device",)  # what a header's history leaves out: it should not change the result


@dataclass(frozen=True)
class TrainingSettings:
    """How LoRA weights are trained, by `train-adapter` and `merge` alike.

    Lengths are in tokens; `batch_size` is in examples an optimiser step, `warmup` a share of all
    steps, `patience` in epochs without a lower validation loss.
    """

    lr: float = 2e-4
    epochs: int = 20
    patience: int = 3
    batch_size: int = 8
    micro_batch_tokens: int = 1024
    max_length: int | None = None
    truncate: bool = False
    dropout: float = 0.05
    warmup: float = 0.05
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0
    chat: str = "auto"
    dtype: str = "auto"
    device: str = "auto"

    def told(self) -> dict[str, Any]:
        """Return the settings as the history in an adapter's header tells them."""
        return {name: value for name, value in asdict(self).items() if name not in _UNTOLD}


@dataclass(frozen=True)
class LoraSettings:
    """The shape of a new adapter; no `target_modules` means query and value, no `layers` all."""

    rank: int = 8
    alpha: float = 16
    target_modules: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PruningSettings:
    """What is zeroed after every step: `prune_ratio` of each group, as an exact decimal.

    `calibrate_every` is in optimiser steps; None refreshes the input norms once an epoch.
    """

    prune_ratio: Decimal = Decimal(0)
    importance: str = "input"
    calibrate_every: int | None = None

    def told(self) -> dict[str, Any]:
        """Return the settings as the history in an adapter's header tells them."""
        return {**asdict(self), "prune_ratio": float(self.prune_ratio)}


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are written; temperature 0 is greedy decoding."""

    max_new_tokens: int = 128
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    truncate: bool = False
    max_length: int | None = None
    chat: str = "auto"
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class JudgeSettings:
    """How judges are asked; `timeout` is in seconds, `request` the fields besides the question."""

    request: Mapping[str, Any] = field(default_factory=lambda: {"max_tokens": 16, "temperature": 0})
    concurrency: int = 4
    timeout: float = 60.0
    retries: int = 5


HOLD_OUT = 0.2  # the share of --data that validates when --val is missing
