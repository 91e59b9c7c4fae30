"""How far a training run has come, and which of its epochs is its result."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """How far training has come: what a resumed run needs besides weights, moments and hooks.

    `epoch` counts finished epochs. `best_epoch` is the one whose weights are the run's result so
    far: with `--keep last`, the last one. `best_value`, higher is better, is its metric of
    --select-by (the negative loss where that is `loss`); `best_loss` breaks ties. `highest_value`
    is that of any epoch. `loss_sum` and `targets` belong to the current epoch. `validation_due`
    says that a hook waits for a validation pass before the next step.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_value: float = -math.inf
    best_loss: float = math.inf
    highest_value: float = -math.inf
    loss_sum: float = 0.0
    targets: int = 0
    validation_due: bool = False

    @property
    def stale(self) -> int:
        """Epochs since the best one."""
        return self.epoch - self.best_epoch

    def has_result(self, *, last: bool) -> bool:
        """Return whether the epoch to keep, the best or the `last` one, is there so far."""
        return 0 < self.epoch == self.best_epoch if last else self.best_epoch > 0

    def is_best(self, value: float, loss: float, *, last: bool) -> bool:
        """Return whether the epoch just finished beats all before it, of which `last` is kept."""
        if last:
            return math.isfinite(loss) and value > self.highest_value
        best = (self.best_value, -self.best_loss)
        return math.isfinite(loss) and (value, -loss) > best

    def keep(self, value: float, loss: float) -> None:
        """Take the epoch just finished for the run's result so far."""
        self.best_epoch = self.epoch
        self.best_value, self.best_loss = value, loss
