"""Pruning in training: which parameters of a stack are reset after each optimiser step.

The formulas are in criteria.py; here they are applied to the blocks of a stacked adapter on a
model. A/B pairs whose matrices have the same shapes are handled together, with one selection for
all of them: for 2 adapters on 2 projections of 30 layers, 120 pairs, there are 2 or 4 selections a
step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lorakit.adapters.blocks import Block
from lorakit.merging.criteria import (
    CRITERIA,
    VALUES,
    Evidence,
    least_important,
    mean_importance,
    prune_count,
    smooth_,
)
from lorakit.merging.input_norms import InputNorms
from lorakit.models.lora import PeftLayer, factors
from lorakit.settings import PruningSettings
from lorakit.training.trainer import State, StepHook

Matrices = tuple[torch.Tensor, torch.Tensor]  # A and B, or two tensors of their shapes
Shapes = tuple[torch.Size, torch.Size]


@dataclass(frozen=True)
class BlockPair:
    """The A (rank, d_in) and B (d_out, rank) of one block at one projection."""

    block: str
    module: str
    span: slice  # the block's ranks in the stack

    def of(self, matrices: Matrices) -> Matrices:
        """Return views of this block's part of two matrices with the shapes of A and B."""
        return matrices[0][self.span], matrices[1][:, self.span]


@dataclass(frozen=True)
class Averages:
    """The moving averages of the gradient criterion for a module, with the shapes of A and B."""

    sensitivity: Matrices
    uncertainty: Matrices


class Pruner(StepHook):
    """Resets what is least important after each step, according to the settings (Algorithm 1).

    With unit `parameter`: floor(ratio·n) of the n parameters of every A and every B of every block.
    With unit `module`: whole pairs whose mean importance is below the threshold. A criterion that
    reads `norms` needs their hook before this one.
    """

    name = "pruner"

    def __init__(
        self,
        blocks: tuple[Block, ...],
        layers: Mapping[str, PeftLayer],
        settings: PruningSettings,
        *,
        norms: InputNorms | None = None,
        seed: int = 0,
    ) -> None:
        self._layers, self._settings, self._norms, self._seed = layers, settings, norms, seed
        self._weights: dict[str, Matrices] = {}
        for name, layer in layers.items():
            a, b = factors(layer)
            self._weights[name] = (a.detach(), b.detach())
        self._criterion = CRITERIA[settings.importance]
        self._value = VALUES[settings.prune_value]
        self._start = self._copies() if self._value.reads_start else {}
        self._pairs: dict[Shapes, list[BlockPair]] = {}
        for block in blocks:
            for name, part in block.modules.items():
                pair = BlockPair(block.name, name, part.span)
                of_a, of_b = pair.of(self._weights[name])
                self._pairs.setdefault((of_a.shape, of_b.shape), []).append(pair)
        self._averages = self._zero_averages() if self._criterion.reads == "averages" else {}
        self._gradients: dict[str, Matrices] = {}
        self._stacked_norms: dict[Shapes, Matrices] = {}
        self._norms_version = 0

    def _copies(self) -> dict[str, Matrices]:
        return {name: (a.clone(), b.clone()) for name, (a, b) in self._weights.items()}

    def _zero_averages(self) -> dict[str, Averages]:
        def zeros(name: str) -> Matrices:
            a, b = self._weights[name]
            return torch.zeros_like(a), torch.zeros_like(b)

        return {name: Averages(zeros(name), zeros(name)) for name in self._weights}

    def before_clipping(self) -> None:
        """Copy the gradients of this step, if the criterion reads them."""
        if not self._averages:
            return
        for name, layer in self._layers.items():
            a, b = (factor.grad for factor in factors(layer))
            if a is not None and b is not None:
                self._gradients[name] = (a.clone(), b.clone())

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Reset what is least important by the latest input norms or gradients.

        `step` seeds the draws of the value `reinit`.
        """
        self._smooth_averages_()
        draws = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        for pairs, weights, importance in self._importances():
            masks = self._masks(*importance)
            starts = self._stacked(self._start, pairs) if self._start else weights
            for index, (weight, start, mask) in enumerate(zip(weights, starts, masks, strict=True)):
                value = self._value.of(weight, start, index == 1, draws)
                for pair, pruned in zip(pairs, torch.where(mask, value, weight), strict=True):
                    pair.of(self._weights[pair.module])[index].copy_(pruned)

    @torch.no_grad()
    def mean_importances(self) -> dict[tuple[str, str], float]:
        """Return the mean importance of every A/B pair, by block and module."""
        return {
            (pair.block, pair.module): mean
            for pairs, _, importance in self._importances()
            for pair, mean in zip(pairs, mean_importance(*importance).tolist(), strict=True)
        }

    def state(self) -> State:
        """Return the current moving averages of the gradient criterion."""
        return {name: tensor.clone() for name, tensor in self._averages_by_name()}

    def restore_(self, state: State) -> None:
        """Restore the moving averages."""
        for name, tensor in self._averages_by_name():
            tensor.copy_(state[name])

    def _averages_by_name(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the moving averages by the names under which they are saved."""
        for module, averages in self._averages.items():
            for factor, index in (("A", 0), ("B", 1)):
                yield f"sensitivity.{module}.{factor}", averages.sensitivity[index]
                yield f"uncertainty.{module}.{factor}", averages.uncertainty[index]

    def _smooth_averages_(self) -> None:
        for name, gradients in self._gradients.items():
            averages = self._averages[name]
            for index, gradient in enumerate(gradients):
                smooth_(
                    averages.sensitivity[index],
                    averages.uncertainty[index],
                    self._weights[name][index],
                    gradient,
                )

    def _importances(self) -> Iterator[tuple[list[BlockPair], Matrices, Matrices]]:
        """Yield the pairs of each shape with their weights and importances.

        Both are (pairs, rank, d_in) for A and (pairs, d_out, rank) for B.
        """
        self._stack_norms()
        criterion = self._criterion.score
        for shapes, pairs in self._pairs.items():
            weights = self._stacked(self._weights, pairs)
            for_a, for_b = self._evidence(shapes, pairs)
            yield pairs, weights, (criterion(weights[0], for_a), criterion(weights[1], for_b))

    def _evidence(self, shapes: Shapes, pairs: list[BlockPair]) -> tuple[Evidence, Evidence]:
        """Return what the criterion reads besides the weights, for A and for B."""
        if self._averages:
            averages = self._averages.items()
            sensitivity = {name: average.sensitivity for name, average in averages}
            uncertainty = {name: average.uncertainty for name, average in averages}
            of_a, of_b = zip(
                self._stacked(sensitivity, pairs), self._stacked(uncertainty, pairs), strict=True
            )
            return Evidence(averages=of_a), Evidence(averages=of_b)
        if shapes in self._stacked_norms:
            of_x, of_ax = self._stacked_norms[shapes]
            return Evidence(norms=of_x), Evidence(norms=of_ax)
        return Evidence(), Evidence()

    def _stack_norms(self) -> None:
        """Stack the input norms in the order of the pairs, after every pass that collected them."""
        norms = self._norms
        if norms is None or norms.version == self._norms_version:
            return
        self._norms_version = norms.version
        for shapes, pairs in self._pairs.items():
            of_x = torch.stack([norms.norms(pair.module)[0] for pair in pairs])
            of_ax = torch.stack([norms.norms(pair.module)[1][pair.span] for pair in pairs])
            self._stacked_norms[shapes] = (of_x.unsqueeze(1), of_ax.unsqueeze(1))

    @staticmethod
    def _stacked(by_module: Mapping[str, Matrices], pairs: list[BlockPair]) -> Matrices:
        """Return the pairs' parts of the modules' matrices, stacked: (pairs, …) each."""
        parts = [pair.of(by_module[pair.module]) for pair in pairs]
        return torch.stack([a for a, _ in parts]), torch.stack([b for _, b in parts])

    def _masks(self, of_a: torch.Tensor, of_b: torch.Tensor) -> Matrices:
        """Return masks of what to reset, from the importances and in their shapes."""
        if self._settings.unit == "module":
            low = mean_importance(of_a, of_b) < float(self._settings.prune_threshold or 0)
            return low[:, None, None].expand_as(of_a), low[:, None, None].expand_as(of_b)
        ratio = self._settings.prune_ratio
        return (
            least_important(of_a, prune_count(ratio, of_a[0].numel())),
            least_important(of_b, prune_count(ratio, of_b[0].numel())),
        )


def pruning_hooks(
    blocks: tuple[Block, ...],
    layers: Mapping[str, PeftLayer],
    settings: PruningSettings,
    *,
    seed: int = 0,
) -> tuple[StepHook, ...]:
    """Return the hooks that prune a trainer's weights: the input norms first, if they are needed.

    There are none if nothing can ever be reset.
    """
    if not settings.prunes and settings.unit != "module":
        return ()
    if CRITERIA[settings.importance].reads != "norms":
        return (Pruner(blocks, layers, settings, seed=seed),)
    norms = InputNorms(layers, every=settings.calibrate_every)
    return norms, Pruner(blocks, layers, settings, norms=norms, seed=seed)
