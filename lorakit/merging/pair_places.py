"""The A/B pairs of blocks, and where those of one shape lie in the weights.

A stack of them is read and written at every step. A block's columns of B lie apart in memory, where
PyTorch copies one block after another; so whole B's are written wherever blocks are all of their
columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

Matrices = tuple[torch.Tensor, torch.Tensor]  # A and B, or two tensors of their shapes


@dataclass(frozen=True)
class BlockPair:
    """The A (rank, d_in) and B (d_out, rank) of one block at one projection."""

    block: str
    module: str
    span: slice  # the block's ranks in the stack
    scale: float

    def of(self, matrices: Matrices) -> Matrices:
        """Return views of this block's part of two matrices with the shapes of A and B."""
        return matrices[0][self.span], matrices[1][:, self.span]


class Places:
    """The pairs of one shape in the modules' weights, which stay where they are."""

    def __init__(self, pairs: Sequence[BlockPair], weights: Mapping[str, Matrices]) -> None:
        self._of_a, self._of_b = _parts(weights, pairs)
        by_module = _by_module(pairs)
        self._whole_b = [weights[module][1] for module in by_module]
        # which pairs every B consists of, (modules, blocks); None where some hold other columns
        self._order: torch.Tensor | None = None
        alike = len({len(own) for own in by_module.values()}) == 1
        if alike and all(_are_whole(pairs, *item, weights) for item in by_module.items()):
            self._order = torch.tensor(list(by_module.values()), device=self._whole_b[0].device)

    def read(self) -> Matrices:
        """Return a copy of the pairs' A (pairs, rank, d_in) and B (pairs, d_out, rank)."""
        return torch.stack(self._of_a), torch.stack(self._of_b)

    @torch.no_grad()
    def write_(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Put what `read` would return into the weights."""
        torch._foreach_copy_(self._of_a, list(a.unbind()))
        if self._order is None:
            torch._foreach_copy_(self._of_b, list(b.unbind()))
            return
        whole = b[self._order].transpose(1, 2).flatten(2)  # (modules, d_out, all ranks)
        torch._foreach_copy_(self._whole_b, list(whole.unbind()))


def stacked(by_module: Mapping[str, Matrices], pairs: Sequence[BlockPair]) -> Matrices:
    """Return the pairs' parts of the modules' matrices, stacked: (pairs, …) each."""
    of_a, of_b = _parts(by_module, pairs)
    return torch.stack(of_a), torch.stack(of_b)


def _parts(
    by_module: Mapping[str, Matrices], pairs: Sequence[BlockPair]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return views of the pairs' parts of A's, and of B's."""
    parts = [pair.of(by_module[pair.module]) for pair in pairs]
    return [a for a, _ in parts], [b for _, b in parts]


def _by_module(pairs: Sequence[BlockPair]) -> dict[str, list[int]]:
    """Return which pairs are at each module, in the order of their ranks."""
    found: dict[str, list[int]] = {}
    for index, pair in sorted(enumerate(pairs), key=lambda item: item[1].span.start):
        found.setdefault(pair.module, []).append(index)
    return found


def _are_whole(
    pairs: Sequence[BlockPair], module: str, own: Sequence[int], weights: Mapping[str, Matrices]
) -> bool:
    """Return whether these pairs of a module are all columns of its B, one after the other."""
    starts = [pairs[index].span.start for index in own]
    ends = [pairs[index].span.stop for index in own]
    return [*starts, weights[module][1].shape[1]] == [0, *ends]
