"""StepHook: how something besides training, such as pruning, takes part in a trainer's steps.

The trainer calls its hooks and knows nothing of what they do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch

from lorakit.reporting import Measurements
from lorakit.training.loss import BatchLoss

State = Mapping[str, torch.Tensor]


class StepHook:
    """Called around every optimiser step; does nothing unless a subclass overrides a method.

    `name` identifies the hook in checkpoints, among those of one trainer.
    """

    name = ""

    def is_validation_due(self, step: int) -> bool:
        """Return whether to run the validation set through the model before the next step.

        `step` steps are done, or, where it is 0, a run begins, resumed or not.
        """
        return False

    def before_clipping(self) -> None:
        """Read the gradients of the step before they are clipped."""

    def after_step(self, step: int) -> None:
        """Change the weights after the optimiser's step, number `step` from 1."""

    def around_validation(self, losses: BatchLoss) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the validation set is run through the model."""
        return contextlib.nullcontext()

    def begin(self, steps_an_epoch: int) -> None:
        """Prepare for a run of so many optimiser steps an epoch, before its first step."""

    def measurements(self) -> Measurements:
        """Return what the log is to say about the last step besides its report, by field."""
        return {}

    def notes(self) -> Sequence[str]:
        """Return what the user is to be told at the end of the run, a line each."""
        return ()

    def state(self) -> State:
        """Return copies of the tensors that a resumed run needs from this hook, by name."""
        return {}

    def restore_(self, state: State) -> None:
        """Restore what `state` returned."""
