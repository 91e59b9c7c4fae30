"""Pruning in training: which parameters of a stack are reset after an optimiser step.

What is important is in pair_scores.py, among what the least important is chosen in groups.py, what
it is reset to in criteria.py; here that is done at the steps of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from lorakit.adapters.blocks import Block
from lorakit.merging.criteria import CRITERIA, VALUES
from lorakit.merging.groups import GROUPS, Masks, Scores, least_pairs, pairs_below
from lorakit.merging.input_norms import InputNorms
from lorakit.merging.pair_places import BlockPair, Matrices, stacked
from lorakit.merging.pair_scores import PairScores, PairStack
from lorakit.merging.turnover import Turnover
from lorakit.models.lora import PeftLayer
from lorakit.reporting import Measurements
from lorakit.settings import PruningSettings
from lorakit.training.step_hook import State, StepHook
from lorakit.training.trainer import Trainer


class Pruner(StepHook):
    """Resets what is least important after a step, according to the settings (Algorithm 1).

    With unit `parameter`: floor(ratio·n) of the n parameters of every group. With unit `module`:
    whole pairs, the least important up to that share, or those below the threshold. It prunes after
    every `prune_every`-th step and after the last step of each epoch, so that the weights of every
    epoch that may be saved are pruned. A criterion that reads `norms` needs their hook before this
    one.
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
        self._settings, self._seed = settings, seed
        self._scores = PairScores(blocks, layers, settings.importance, norms=norms)
        self._weights = self._scores.weights
        self._value = VALUES[settings.prune_value]
        self._start = self._copies() if self._value.reads_start else {}
        self._steps_an_epoch: int | None = None
        self._turnover = Turnover()

    def _copies(self) -> dict[str, Matrices]:
        return {name: (a.clone(), b.clone()) for name, (a, b) in self._weights.items()}

    def begin(self, steps_an_epoch: int) -> None:
        """Remember which steps are the last of an epoch."""
        self._steps_an_epoch = steps_an_epoch

    def before_clipping(self) -> None:
        """Copy the gradients of this step, if the criterion reads them."""
        self._scores.read_gradients()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Smooth the gradient's averages, and prune if this step is one to prune after."""
        self._scores.smooth_averages_()
        self._turnover.begin_step()
        if self._is_due(step):
            self._prune_(step)

    def _is_due(self, step: int) -> bool:
        """Return whether to prune after this step, counted from 1."""
        if self._steps_an_epoch and step % self._steps_an_epoch == 0:
            return True
        every = self._settings.prune_every
        return every != "epoch" and step % every == 0

    def _prune_(self, step: int) -> None:
        """Reset what is least important by the latest input norms or gradients.

        `step` seeds the draws of the value `reinit`.
        """
        draws = self._draws(step)
        for stacks in self._rounds():
            masks = self._choose([stack.scores for stack in stacks])
            for stack, of_stack in zip(stacks, masks, strict=True):
                self._turnover.count(of_stack, self._reset_(stack, of_stack, draws))
        self._turnover.end_step()

    def _rounds(self) -> Iterator[list[PairStack]]:
        """Yield the pairs among which something is chosen: of each shape, or all at once."""
        settings = self._settings
        by_share = settings.unit == "module" and not settings.by_threshold
        if by_share or GROUPS[settings.group].wide:
            yield list(self._scores.stacks())
        else:
            yield from ([stack] for stack in self._scores.stacks())

    def _choose(self, stacks: Sequence[Scores]) -> list[Masks]:
        """Return masks of what to reset of each stack."""
        settings = self._settings
        if settings.unit == "parameter":
            return GROUPS[settings.group].choose(stacks, settings.prune_ratio)
        if settings.by_threshold:
            return pairs_below(stacks, settings.value)
        return least_pairs(stacks, settings.prune_ratio, by_adapter=settings.group == "adapter")

    def _draws(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed * 1_000_003 + step)

    def _reset_(self, stack: PairStack, masks: Masks, draws: torch.Generator) -> Matrices:
        """Reset the masked parameters of the pairs of one shape, and return their new weights."""
        values = self._reset_values(stack.pairs, stack.weights, draws)
        a, b = (
            torch.where(mask, value, weight)
            for mask, value, weight in zip(masks, values, stack.weights, strict=True)
        )
        stack.places.write_(a, b)
        return a, b

    def _reset_values(
        self, pairs: Sequence[BlockPair], weights: Matrices, draws: torch.Generator
    ) -> Matrices:
        """Return what the parameters of the pairs are reset to, stacked as their weights are."""
        start_a, start_b = stacked(self._start, pairs) if self._start else weights
        of_a = self._value.of(weights[0], start_a, False, draws)
        return of_a, self._value.of(weights[1], start_b, True, draws)

    @property
    def resets_to_zero(self) -> bool:
        """Whether zero is what parameters are reset to."""
        return self._settings.prune_value == "zero"

    @torch.no_grad()
    def shares_reset(self, weights: Mapping[str, Matrices], step: int) -> dict[str, float]:
        """Return, by block, the share of parameters that stand at their reset value.

        `weights` are A and B by module after step `step`, which draws what `reinit` resets to.
        """
        names = self._scores.blocks
        counts, sizes = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        draws = self._draws(step)
        for pairs in self._scores.pairs.values():
            values = self._reset_values(pairs, stacked(self._weights, pairs), draws)
            for index, pair in enumerate(pairs):
                for weight, value in zip(pair.of(weights[pair.module]), values, strict=True):
                    counts[pair.block] += int((weight == value[index].to(weight.device)).sum())
                    sizes[pair.block] += weight.numel()
        return {name: counts[name] / sizes[name] if sizes[name] else 0.0 for name in names}

    def mean_importances(self) -> dict[tuple[str, str], float]:
        """Return the mean importance of every A/B pair, by block and module (PairScores.means)."""
        return self._scores.means()

    def measurements(self) -> Measurements:
        """Return the shares of the last step, and how many pairs are zero in A and in B."""
        return self._turnover.measurements()

    def notes(self) -> Sequence[str]:
        """Return a line where hardly anything but the same was chosen, and where pairs are dead."""
        return self._turnover.notes(sum(len(pairs) for pairs in self._scores.pairs.values()))

    def state(self) -> State:
        """Return the moving averages of the gradient criterion, and the turnover so far."""
        return {**self._scores.state(), **self._turnover.state()}

    def restore_(self, state: State) -> None:
        """Restore what `state` returned."""
        self._scores.restore_(state)
        self._turnover.restore_(state)


def shares_reset(trainer: Trainer) -> dict[str, float]:
    """Return, by block, the share of a run's best weights at the value that they are reset to.

    It is empty where nothing is pruned, or to zero.
    """
    shares: dict[str, float] = {}
    for hook in trainer.hooks:
        if isinstance(hook, Pruner) and not hook.resets_to_zero:
            best = {name: (a, b) for name, (a, b) in trainer.best.items()}
            shares |= hook.shares_reset(best, trainer.best_step)
    return shares


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
    if not settings.prunes and not settings.by_threshold:
        return ()
    if CRITERIA[settings.importance].reads != "norms":
        return (Pruner(blocks, layers, settings, seed=seed),)
    norms = InputNorms(layers, every=settings.calibrate_every)
    return norms, Pruner(blocks, layers, settings, norms=norms, seed=seed)
