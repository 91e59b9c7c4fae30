"""Pruning applied to a stack in training: which parameters are reset after each optimiser step.

The formulas are in criteria.py; here they are laid over the blocks of a stacked adapter on a model.
Pairs whose matrices have the same shapes are worked on together, one selection for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.merging.criteria import (
    CRITERIA,
    VALUES,
    Seen,
    least_important,
    mean_importance,
    prune_count,
    smooth_,
)
from lorakit.merging.input_norms import InputNorms
from lorakit.merging.stack import Stack
from lorakit.models.lora import factors
from lorakit.settings import PruningSettings


@dataclass(frozen=True)
class Pair:
    """The A (rank, d_in) and B (d_out, rank) of one block at one projection."""

    block: str
    module: str
    span: slice  # the block's ranks in the stack

    def of(self, both: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of this block's part of a module's A and B, or what has their shape."""
        return both[0][self.span], both[1][:, self.span]


class Pruner:
    """Resets, after each step, what is least important, by the settings (Algorithm 1).

    With unit `parameter`: floor(ratio·n) of the n parameters of every A and every B. With unit
    `module`: whole pairs whose mean importance is below the threshold.
    """

    def __init__(
        self, stacked: Stack, layers: Mapping[str, Any], settings: PruningSettings, *, seed: int = 0
    ) -> None:
        self._settings, self._seed = settings, seed
        self._weights = {
            name: (a.detach(), b.detach())
            for name, (a, b) in ((name, factors(layer)) for name, layer in layers.items())
        }
        self._start = self._copies() if settings.prune_value == "init" else {}
        self._alike: dict[Any, list[Pair]] = {}
        for block in stacked.blocks:
            for name, part in block.modules.items():
                pair = Pair(block.name, name, part.span)
                shapes = tuple(weight.shape for weight in pair.of(self._weights[name]))
                self._alike.setdefault(shapes, []).append(pair)
        self.averages = self._zeros() if self.reads_gradients else {}
        self._gradients: dict[str, tuple[torch.Tensor, ...]] = {}
        self._inputs: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        self._version: tuple[int, int] | None = None

    @property
    def reads_norms(self) -> bool:
        """Whether the norms of the inputs are to be collected."""
        return self._settings.importance == "input"

    @property
    def reads_gradients(self) -> bool:
        """Whether `observe_` is to be called with each step's gradient, before it is clipped."""
        return self._settings.importance == "gradient"

    def _copies(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {name: (a.clone(), b.clone()) for name, (a, b) in self._weights.items()}

    def _zeros(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Return Ī of A, Ī of B, U of A and U of B by module, all zero."""
        return {
            name: tuple(torch.zeros_like(factor) for factor in (a, b, a, b))
            for name, (a, b) in self._weights.items()
        }

    def observe_(self, layers: Mapping[str, Any]) -> None:
        """Keep the gradients of this step, as they are before they are clipped."""
        for name, layer in layers.items():
            a, b = (factor.grad for factor in factors(layer))
            if a is not None and b is not None:
                self._gradients[name] = (a.clone(), b.clone())

    @torch.no_grad()
    def prune_(self, norms: InputNorms, step: int) -> None:
        """Reset what is chosen, by the norms of the last calibration; `step` seeds new draws."""
        self._smooth_()
        draws = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        for pairs, weights, importance in self._scored(norms):
            chosen = self._chosen(*importance)
            starts = self._stacked(self._start, pairs) if self._start else weights
            for place, (weight, start, mask) in enumerate(
                zip(weights, starts, chosen, strict=True)
            ):
                value = VALUES[self._settings.prune_value](weight, start, place == 1, draws)
                for pair, pruned in zip(pairs, torch.where(mask, value, weight), strict=True):
                    pair.of(self._weights[pair.module])[place].copy_(pruned)

    @torch.no_grad()
    def means(self, norms: InputNorms) -> dict[tuple[str, str], float]:
        """Return the mean importance of every pair, by block and module."""
        return {
            (pair.block, pair.module): mean
            for pairs, _, importance in self._scored(norms)
            for pair, mean in zip(pairs, mean_importance(*importance).tolist(), strict=True)
        }

    def _smooth_(self) -> None:
        for name, gradients in self._gradients.items():
            averages = self.averages[name]
            for place, gradient in enumerate(gradients):
                weight = self._weights[name][place]
                smooth_(averages[place], averages[place + 2], weight, gradient)

    def _scored(self, norms: InputNorms) -> Iterator[tuple[list[Pair], Any, Any]]:
        """Yield pairs of one shape with their weights and their importance, A and B of each.

        Tensors are (pairs, rank, d_in) and (pairs, d_out, rank).
        """
        self._gather(norms)
        for shapes, pairs in self._alike.items():
            weights = self._stacked(self._weights, pairs)
            seen = zip(*self._averages_of(pairs), strict=True) if self.averages else [(), ()]
            criterion = CRITERIA[self._settings.importance]
            inputs = self._inputs.get(shapes, (None, None))
            importance = tuple(
                criterion(weight, Seen(read, *averages))
                for weight, read, averages in zip(weights, inputs, seen, strict=True)
            )
            yield pairs, weights, importance

    def _averages_of(self, pairs: list[Pair]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        halves = (
            {name: four[at : at + 2] for name, four in self.averages.items()} for at in (0, 2)
        )
        return [self._stacked(half, pairs) for half in halves]

    def _gather(self, norms: InputNorms) -> None:
        """Line the norms up with the pairs, once a calibration."""
        version = (id(norms), norms.version)
        if not self.reads_norms or version == self._version:
            return
        self._version = version
        for shapes, pairs in self._alike.items():
            read = [norms.norms(pair.module) for pair in pairs]
            of_x = torch.stack([x for x, _ in read])
            of_ax = torch.stack([ax[pair.span] for (_, ax), pair in zip(read, pairs, strict=True)])
            self._inputs[shapes] = (of_x.unsqueeze(1), of_ax.unsqueeze(1))

    @staticmethod
    def _stacked(whole: Mapping[str, Any], pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [pair.of(whole[pair.module]) for pair in pairs]
        return torch.stack([a for a, _ in parts]), torch.stack([b for _, b in parts])

    def _chosen(self, of_a: torch.Tensor, of_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return masks of what is reset, shaped as the weights."""
        if self._settings.unit == "module":
            low = mean_importance(of_a, of_b) < float(self._settings.prune_threshold or 0)
            of_pair = low[:, None, None]
            return of_pair.expand_as(of_a), of_pair.expand_as(of_b)
        ratio = self._settings.prune_ratio
        of_group = [
            least_important(scores, prune_count(ratio, scores[0].numel()))
            for scores in (of_a, of_b)
        ]
        return of_group[0], of_group[1]
