"""How much pruning changes its mind: what the log and the user are told about the masks of a run.

AdamW regrows a reset parameter by about the learning rate a step. Where that is little, the same
parameters are chosen at every step, so that pruning happens once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorakit.merging.groups import Masks
from lorakit.reporting import Measurements
from lorakit.training.step_hook import State

_LITTLE = 0.01  # the mean turnover below which a note tells the user


class Turnover:
    """Counts what each step resets, and how much of that the pruning before it did not reset.

    At every step `begin_step`; where the step prunes, then `count` the masks of the pairs of each
    shape, always in the same order, and `end_step`.
    """

    def __init__(self) -> None:
        self._before: list[Masks] = []
        self._now: list[Masks] = []
        self._counts: list[torch.Tensor] = []
        self._parameters = 0
        self._sum, self._steps = 0.0, 0  # of turnovers, and how many there were
        self._share, self._dead = 0.0, 0
        self._turnover: float | None = None

    def begin_step(self) -> None:
        """Begin a step that resets nothing, unless masks are counted."""
        self._share, self._turnover = 0.0, None

    def count(self, masks: Masks, weights: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Count what masks reset of the pairs of one shape; `weights` are those after the reset."""
        before = self._before[len(self._now)] if self._before else masks
        new_a, new_b = (
            (now & ~old.to(now.device)).sum() for now, old in zip(masks, before, strict=True)
        )
        alive = weights[0].flatten(1).any(1) | weights[1].flatten(1).any(1)
        reset = masks[0].sum() + masks[1].sum()
        self._counts.append(torch.stack([reset, new_a + new_b, (~alive).sum()]))
        self._now.append(masks)
        self._parameters += sum(mask.numel() for mask in masks)

    def end_step(self) -> None:
        """Sum up the counts of a step."""
        reset, new, self._dead = torch.stack(self._counts).sum(0).tolist()
        self._share = reset / self._parameters
        if self._before and reset:
            turnover = new / reset
            self._turnover, self._sum, self._steps = turnover, self._sum + turnover, self._steps + 1
        self._before, self._now, self._counts, self._parameters = self._now, [], [], 0

    def measurements(self) -> Measurements:
        """Return what the log says about the last step.

        `share_pruned`: the share of all LoRA parameters that it reset; `turnover`: the share of
        those that the pruning before did not reset, None at the first one;
        `dead_pairs`: how many A/B pairs had A = B = 0 at the last pruning, which leaves them no
        gradient.
        """
        return {
            "share_pruned": self._share,
            "turnover": self._turnover,
            "dead_pairs": self._dead,
        }

    def notes(self, pairs: int) -> Sequence[str]:
        """Return what the user is told at the end, a line each; `pairs` is how many there are."""
        notes = []
        if self._steps and (mean := self._sum / self._steps) < _LITTLE:
            notes.append(
                f"the same parameters were chosen at every step (mean turnover {mean:.2%}); a "
                "larger --lr or --prune-every lets them grow"
            )
        if self._dead:
            notes.append(
                f"{self._dead} of {pairs} A/B pairs ended with A = B = 0, which have no gradient"
            )
        return notes

    def state(self) -> State:
        """Return the sum of the turnovers, their number, and what the last pruning left."""
        masks = {
            f"turnover_mask.{number}.{factor}": of_factor
            for number, of_shape in enumerate(self._before)
            for factor, of_factor in zip("AB", of_shape, strict=True)
        }
        return {
            "turnover_sum": torch.tensor(self._sum),
            "turnover_steps": torch.tensor(float(self._steps)),
            "turnover_dead": torch.tensor(float(self._dead)),
            **masks,
        }

    def restore_(self, state: State) -> None:
        """Restore what `state` returned."""
        self._sum, self._steps = float(state["turnover_sum"]), int(state["turnover_steps"])
        self._dead = int(state["turnover_dead"])
        shapes = sum(name.startswith("turnover_mask.") for name in state) // 2
        self._before = [
            (state[f"turnover_mask.{number}.A"].bool(), state[f"turnover_mask.{number}.B"].bool())
            for number in range(shapes)
        ]
