"""The pairs of one shape are read from the weights and written back, block by block."""

from __future__ import annotations

import pytest
import torch

from lorakit.merging.pair_places import BlockPair, Matrices, Places

D_IN, D_OUT = 5, 7


def weights_of(ranks: list[int]) -> dict[str, Matrices]:
    draw = torch.Generator().manual_seed(0)
    return {
        module: (
            torch.randn(rank, D_IN, generator=draw),
            torch.randn(D_OUT, rank, generator=draw),
        )
        for module, rank in zip("pqr", ranks, strict=True)
    }


def pairs_at(modules: str, spans: list[tuple[int, int]]) -> list[BlockPair]:
    """Return the pairs of a block for each span, at each module, in the blocks' order."""
    return [
        BlockPair(f"block {number}", module, slice(*span), 1.0)
        for number, span in enumerate(spans)
        for module in modules
    ]


@pytest.mark.parametrize(
    ("pairs", "ranks", "is_whole"),
    [
        (pairs_at("pqr", [(0, 2), (2, 4), (4, 6)]), 6, True),
        (pairs_at("pr", [(4, 6), (0, 2), (2, 4)]), 6, True),  # in another order
        (pairs_at("pqr", [(0, 4)]), 4, True),
        (pairs_at("pqr", [(0, 2), (4, 6)]), 6, False),  # a block of another rank lies between
        (pairs_at("pqr", [(2, 4), (4, 6)]), 6, False),
        (pairs_at("pqr", [(0, 2), (2, 4)]), 6, False),
        ([*pairs_at("pq", [(0, 2), (2, 4)]), *pairs_at("r", [(0, 2)])], 4, False),
        ([*pairs_at("pq", [(0, 2), (2, 4)]), *pairs_at("r", [(0, 2)])], [4, 4, 2], False),
    ],
)
def test_what_is_written_stands_in_the_blocks_parts_and_nowhere_else(
    pairs: list[BlockPair], ranks: int | list[int], is_whole: bool
) -> None:
    weights = weights_of([ranks] * 3 if isinstance(ranks, int) else ranks)
    expected = {module: (a.clone(), b.clone()) for module, (a, b) in weights.items()}
    places = Places(pairs, weights)
    assert (places._order is not None) == is_whole
    a, b = places.read()
    for index, pair in enumerate(pairs):
        of_a, of_b = pair.of(weights[pair.module])
        assert torch.equal(a[index], of_a)
        assert torch.equal(b[index], of_b)
        for part, new in zip(pair.of(expected[pair.module]), (a[index], b[index]), strict=True):
            part.copy_(new + (index + 1))
    steps = torch.arange(1.0, len(pairs) + 1)[:, None, None]
    places.write_(a + steps, b + steps)
    for module, matrices in weights.items():
        assert all(map(torch.equal, matrices, expected[module]))
