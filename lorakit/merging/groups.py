"""Groups: among which LoRA parameters, or A/B pairs, the least important are chosen.

In each group of n parameters exactly floor(ratio·n) are chosen, ties or not. To add a group, write
a function and add a line to GROUPS. Scores come from criteria.py; what becomes of what is chosen is
not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from lorakit.merging.criteria import least, least_important, mean_importance, prune_count

if TYPE_CHECKING:
    from torch import Tensor

Masks = tuple["Tensor", "Tensor"]  # of A and of B, bool, true where something is chosen


class Scores(NamedTuple):
    """The importance of the parameters of the A/B pairs of one shape.

    `of_a` (pairs, rank, d_in) and `of_b` (pairs, d_out, rank) are as the criterion gives them.
    Times `factors` (pairs,) they can be compared from one pair to another: a factor is the scale of
    the pair's adapter, over the root of the number of tokens where the criterion reads norms.
    `adapters` (pairs,) numbers the source adapters.
    """

    of_a: Tensor
    of_b: Tensor
    factors: Tensor
    adapters: Tensor

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of parameters in an A and in a B."""
        return self.of_a[0].numel(), self.of_b[0].numel()

    @property
    def means(self) -> Tensor:
        """The mean importance of each pair, comparable: (pairs,)."""
        return mean_importance(self.of_a, self.of_b) * self.factors

    def joined(self) -> Tensor:
        """Return the scores of each pair's parameters, A's before B's: (pairs, parameters)."""
        import torch

        return torch.cat([self.of_a.flatten(1), self.of_b.flatten(1)], dim=1)

    def parted(self, joined: Tensor) -> Masks:
        """Return what was chosen of the parameters of `joined` as masks of A and of B."""
        of_a, of_b = joined.split(self.sizes, dim=1)
        return of_a.view_as(self.of_a), of_b.view_as(self.of_b)

    def whole(self, chosen: Tensor) -> Masks:
        """Return masks of all parameters of the pairs chosen, (pairs,) bool."""
        chosen = chosen[:, None, None]
        return chosen.expand_as(self.of_a), chosen.expand_as(self.of_b)


def each_matrix(stacks: Sequence[Scores], ratio: Decimal) -> list[Masks]:
    """Choose in each A and in each B (the paper: "per each module rather than across modules")."""
    return [
        (
            least_important(scores.of_a, prune_count(ratio, scores.sizes[0])),
            least_important(scores.of_b, prune_count(ratio, scores.sizes[1])),
        )
        for scores in stacks
    ]


def each_pair(stacks: Sequence[Scores], ratio: Decimal) -> list[Masks]:
    """Choose in A and B together, of each adapter at each projection."""
    return [
        scores.parted(least(scores.joined(), prune_count(ratio, sum(scores.sizes))))
        for scores in stacks
    ]


def each_row(stacks: Sequence[Scores], ratio: Decimal) -> list[Masks]:
    """Choose in each row of A, d_in weights, and of B, rank weights: per output, as Wanda does."""
    return [
        (
            least(scores.of_a, prune_count(ratio, scores.of_a.shape[-1])),
            least(scores.of_b, prune_count(ratio, scores.of_b.shape[-1])),
        )
        for scores in stacks
    ]


def each_adapter(stacks: Sequence[Scores], ratio: Decimal) -> list[Masks]:
    """Choose among all parameters of each source adapter."""
    return _across(stacks, [scores.adapters for scores in stacks], ratio)


def all_together(stacks: Sequence[Scores], ratio: Decimal) -> list[Masks]:
    """Choose among all parameters."""
    return _across(stacks, _one_group(stacks), ratio)


class Group(NamedTuple):
    """A way to choose; if it is `wide`, it compares pairs of different shapes."""

    choose: Callable[[Sequence[Scores], Decimal], list[Masks]]
    wide: bool = False


GROUPS: dict[str, Group] = {
    "matrix": Group(each_matrix),
    "pair": Group(each_pair),
    "row": Group(each_row),
    "adapter": Group(each_adapter, wide=True),
    "all": Group(all_together, wide=True),
}
PAIR_GROUPS = ("adapter", "all")  # in which whole pairs can be counted


def pairs_below(stacks: Sequence[Scores], threshold: Decimal) -> list[Masks]:
    """Choose the pairs whose mean importance is below a threshold, whole."""
    return [scores.whole(scores.means < float(threshold)) for scores in stacks]


def least_pairs(stacks: Sequence[Scores], ratio: Decimal, *, by_adapter: bool) -> list[Masks]:
    """Choose pairs, whole, in order of mean importance, of all adapters or of each.

    They go as far as floor(ratio·n) of the n parameters.
    """
    import torch

    groups = [scores.adapters for scores in stacks] if by_adapter else _one_group(stacks)
    means = torch.cat([scores.means for scores in stacks])
    sizes = torch.cat(
        [torch.full_like(g, sum(s.sizes)) for g, s in zip(groups, stacks, strict=True)]
    )
    chosen = torch.zeros_like(means, dtype=torch.bool)
    for group in torch.cat(groups).unique():
        own = (torch.cat(groups) == group).nonzero().flatten()
        order = own[means[own].argsort(stable=True)]
        reached = sizes[order].cumsum(0)
        chosen[order] = reached <= prune_count(ratio, int(reached[-1]))
    by_stack = chosen.split([len(scores.of_a) for scores in stacks])
    return [scores.whole(part) for scores, part in zip(stacks, by_stack, strict=True)]


def _one_group(stacks: Sequence[Scores]) -> list[Tensor]:
    return [scores.adapters.new_zeros(len(scores.adapters)) for scores in stacks]


def _across(stacks: Sequence[Scores], groups: Sequence[Tensor], ratio: Decimal) -> list[Masks]:
    """Choose in each group; `groups` numbers, for every stack, the group of each pair, (pairs,)."""
    import torch

    joined = [scores.joined() * scores.factors[:, None] for scores in stacks]
    masks = [torch.zeros_like(values, dtype=torch.bool) for values in joined]
    for group in torch.cat(list(groups)).unique():
        own = [numbers == group for numbers in groups]
        parts = [values[mine] for values, mine in zip(joined, own, strict=True)]
        flat = torch.cat([part.flatten() for part in parts])
        chosen = least(flat, prune_count(ratio, len(flat))).split([part.numel() for part in parts])
        for mask, mine, part, of_part in zip(masks, own, parts, chosen, strict=True):
            mask[mine] = of_part.view_as(part)
    return [scores.parted(mask) for scores, mask in zip(stacks, masks, strict=True)]
