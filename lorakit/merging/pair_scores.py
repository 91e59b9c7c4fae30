"""The importance of the A/B pairs of a stack on a model, at any moment of its training.

A criterion (criteria.py) reads the weights and either norms of inputs (input_norms.py) or
gradients, whose moving averages are here. Pairs whose matrices have the same shapes are stacked, so
that one operation scores all of them: 120 pairs of 2 adapters on 2 projections of 30 layers have 2
or 4 shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorakit.adapters.blocks import Block
from lorakit.merging.criteria import CRITERIA, Evidence, smooth_
from lorakit.merging.groups import Scores
from lorakit.merging.input_norms import InputNorms
from lorakit.merging.pair_places import BlockPair, Matrices, Places, stacked
from lorakit.models.lora import PeftLayer, factors
from lorakit.training.step_hook import State

Shapes = tuple[torch.Size, torch.Size]


@dataclass(frozen=True)
class PairStack:
    """The pairs of one shape, stacked: weights of A (pairs, rank, d_in), B (pairs, d_out, rank)."""

    pairs: Sequence[BlockPair]
    places: Places
    weights: Matrices
    scores: Scores


class PairScores:
    """Scores the pairs of `blocks` by a criterion, from the weights as they are in `layers`.

    Norms are those of the latest pass of `norms`; gradients those of the latest `read_gradients`,
    which `smooth_averages_` puts into the averages.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        layers: Mapping[str, PeftLayer],
        importance: str,
        *,
        norms: InputNorms | None = None,
    ) -> None:
        self._layers, self._norms = layers, norms
        self._criterion = CRITERIA[importance]
        self.weights: dict[str, Matrices] = {}
        for name, layer in layers.items():
            a, b = factors(layer)
            self.weights[name] = (a.detach(), b.detach())
        self.blocks = [block.name for block in blocks]
        self.pairs: dict[Shapes, list[BlockPair]] = {}
        for block in blocks:
            for name, part in block.modules.items():
                pair = BlockPair(block.name, name, part.span, part.scale)
                of_a, of_b = pair.of(self.weights[name])
                self.pairs.setdefault((of_a.shape, of_b.shape), []).append(pair)
        self._places = {name: Places(pairs, self.weights) for name, pairs in self.pairs.items()}
        self._adapters = {
            shapes: torch.tensor(
                [self.blocks.index(pair.block) for pair in pairs],
                device=self.weights[pairs[0].module][0].device,
            )
            for shapes, pairs in self.pairs.items()
        }
        self.gradients: dict[str, Matrices] = {}
        self._sensitivity: dict[str, Matrices] = {}
        self._uncertainty: dict[str, Matrices] = {}
        if self._criterion.reads == "averages":
            self._sensitivity, self._uncertainty = self._zeros(), self._zeros()
        self._stacked_norms: dict[Shapes, Matrices] = {}
        self._factors: dict[Shapes, torch.Tensor] = {}
        self._norms_version = -1

    def _zeros(self) -> dict[str, Matrices]:
        pairs = self.weights.items()
        return {name: (torch.zeros_like(a), torch.zeros_like(b)) for name, (a, b) in pairs}

    def read_gradients(self) -> None:
        """Copy the gradients, if the criterion reads them."""
        if not self._sensitivity:
            return
        for name, layer in self._layers.items():
            a, b = (factor.grad for factor in factors(layer))
            if a is not None and b is not None:
                self.gradients[name] = (a.clone(), b.clone())

    def smooth_averages_(self) -> None:
        """Update the averages by the gradients read, if any, and the weights as they are now."""
        for name, gradients in self.gradients.items():
            for index, gradient in enumerate(gradients):
                smooth_(
                    self._sensitivity[name][index],
                    self._uncertainty[name][index],
                    self.weights[name][index],
                    gradient,
                )

    def stacks(self) -> Iterator[PairStack]:
        """Yield the pairs of each shape with their weights and scores."""
        self._read_norms()
        score = self._criterion.score
        for shapes, pairs in self.pairs.items():
            places = self._places[shapes]
            weights = places.read()
            for_a, for_b = self._evidence(shapes, pairs)
            scores = Scores(
                score(weights[0], for_a),
                score(weights[1], for_b),
                self._factors[shapes],
                self._adapters[shapes],
            )
            yield PairStack(pairs, places, weights, scores)

    @torch.no_grad()
    def means(self) -> dict[tuple[str, str], float]:
        """Return the mean importance of every A/B pair, by block and module.

        Norms are root mean squares over tokens, and the scale of the block's adapter is included.
        """
        return {
            (pair.block, pair.module): mean
            for stack in self.stacks()
            for pair, mean in zip(stack.pairs, stack.scores.means.tolist(), strict=True)
        }

    def state(self) -> State:
        """Return copies of the moving averages of the gradient criterion."""
        return {name: tensor.clone() for name, tensor in self._averages_by_name()}

    def restore_(self, state: State) -> None:
        """Restore the moving averages."""
        for name, tensor in self._averages_by_name():
            tensor.copy_(state[name])

    def _averages_by_name(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the moving averages by the names under which they are saved."""
        for module in self._sensitivity:
            for factor, index in (("A", 0), ("B", 1)):
                yield f"sensitivity.{module}.{factor}", self._sensitivity[module][index]
                yield f"uncertainty.{module}.{factor}", self._uncertainty[module][index]

    def _evidence(self, shapes: Shapes, pairs: list[BlockPair]) -> tuple[Evidence, Evidence]:
        """Return what the criterion reads besides the weights, for A and for B."""
        if self._sensitivity:
            sensitivity = stacked(self._sensitivity, pairs)
            uncertainty = stacked(self._uncertainty, pairs)
            of_a, of_b = zip(sensitivity, uncertainty, strict=True)
            return Evidence(averages=of_a), Evidence(averages=of_b)
        if shapes in self._stacked_norms:
            of_x, of_ax = self._stacked_norms[shapes]
            return Evidence(norms=of_x), Evidence(norms=of_ax)
        return Evidence(), Evidence()

    def _read_norms(self) -> None:
        """Stack norms and factors in the order of the pairs, after every pass that collects any."""
        version = 0 if self._norms is None else self._norms.version
        if version == self._norms_version:
            return
        self._norms_version = version
        for shapes, pairs in self.pairs.items():
            scales = [1.0 if self._criterion.knows_scale else abs(pair.scale) for pair in pairs]
            self._factors[shapes] = self.weights[pairs[0].module][0].new_tensor(scales)
            if self._norms is None or not version or self._criterion.reads != "norms":
                continue
            norms = [self._norms.norms(pair.module) for pair in pairs]
            of_ax = [ax[pair.span] for pair, (_, ax) in zip(pairs, norms, strict=True)]
            self._stacked_norms[shapes] = (
                torch.stack([x for x, _ in norms]).unsqueeze(1),
                torch.stack(of_ax).unsqueeze(1),
            )
            roots = [self._norms.root_of_tokens(pair.module) for pair in pairs]
            self._factors[shapes] /= torch.stack(roots)
