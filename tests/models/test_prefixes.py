"""What all prompts begin with."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lorakit.models.prefixes import shared_prefix


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[*range(9), 20], [*range(9), 21, 22]], list(range(9))),
        ([[*range(9)], [*range(12)]], list(range(8))),  # each has a token more
        ([[*range(8)], [*range(8)]], []),  # seven are too few
        ([[*range(9), 20]], []),
        ([[1, *range(9)], [2, *range(9)]], []),
    ],
)
def test_what_prompts_share_leaves_each_a_token(
    prompts: Sequence[Sequence[int]], expected: Sequence[int]
) -> None:
    assert list(shared_prefix(prompts)) == expected
