"""What all prompts begin with, and how many prefixes are kept."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lorakit.models.prefixes import Prefix, Prefixes, shared_prefix

BYTES = 2 * 3 * 4  # of a prefix of three numbers


class Reader:
    """Reads prefixes of `BYTES`, and notes for what."""

    def __init__(self) -> None:
        self.kept, self.read = Prefixes(), list[str]()

    def get(self, key: str, room: int) -> Prefix:
        def read() -> Prefix:
            self.read.append(key)
            return Prefix(3, {0: (torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1))})

        return self.kept.get(key, read, room)


def test_a_prefix_is_read_once_while_there_is_room() -> None:
    reader = Reader()
    first = reader.get("a", 2 * BYTES)
    assert first.nbytes == BYTES
    reader.get("b", 2 * BYTES)
    assert reader.get("a", 2 * BYTES) is first
    assert reader.read == ["a", "b"]


def test_the_longest_unused_goes_first() -> None:
    reader = Reader()
    for key in "abac":  # a was used after b
        reader.get(key, 2 * BYTES)
    reader.get("a", 2 * BYTES)
    reader.get("b", 2 * BYTES)
    assert reader.read == ["a", "b", "c", "b"]


def test_one_that_takes_more_than_the_room_is_kept_alone() -> None:
    reader = Reader()
    for key in "aab":
        reader.get(key, 0)
    reader.get("a", 0)
    assert reader.read == ["a", "b", "a"]


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
