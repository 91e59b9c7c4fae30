"""Count the n-grams that texts share, of many examples at once.

Texts are arrays of numbers, one for each word or character; this file knows no words and no metric.
An n-gram of an example becomes one number, made of that of its first n-1 tokens and its last token:

    "abab" and "abb"   a=0 b=1      order 1: a, b        2 and 2 of "abab", 1 and 2 of "abb"
                                    order 2: ab, ba, bb  2, 1 and 0,        1, 0 and 1
                                    order 3: from here on only where the text begins with an "ab"

since an n-gram is shared only if its first n-1 tokens are. So few are left at the higher orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


class GramCounts(NamedTuple):
    """The n-grams of one order: the example of each (n,), and how often a side has it (sides × n).

    All n-grams that two sides share are among them.
    """

    example: NDArray[np.int64]
    counts: NDArray[np.int64]


class _Flat(NamedTuple):
    """All texts' tokens in one array, with the side, the example, and the tokens left in the text,
    itself among them."""

    tokens: Tokens
    side: NDArray[np.int64]
    example: NDArray[np.int64]
    left: NDArray[np.int64]


def characters(text: str) -> Tokens:
    """Return the characters of a text as numbers."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)


def numbered(texts: Sequence[Sequence[str]], numbers: dict[str, int]) -> list[Tokens]:
    """Return texts of words as numbers; a word that has none in `numbers` gets the next."""
    return [
        np.array([numbers.setdefault(word, len(numbers)) for word in text], np.int64)
        for text in texts
    ]


def gram_counts(sides: Sequence[Sequence[Tokens]], orders: int) -> Iterator[GramCounts]:
    """Yield the counts of the n-grams of order 1 to `orders`.

    A side is a text for each example, empty where it has none; the first is compared with the rest.
    """
    flat = _flattened(sides)
    width = int(flat.tokens.max(initial=0)) + 1
    start, grams = np.arange(len(flat.tokens)), flat.example
    for order in range(orders):
        inside = flat.left[start] > order
        start, grams = start[inside], grams[inside] * width
        values, grams = np.unique(grams + flat.tokens[start + order], return_inverse=True)
        numbers = flat.side[start] * len(values) + grams
        counts = np.bincount(numbers, minlength=len(sides) * len(values))
        counts = counts.reshape(len(sides), len(values))
        example = np.empty(len(values), np.int64)
        example[grams] = flat.example[start]
        yield GramCounts(example, counts)
        shared = ((counts[0] > 0) & (counts[1:] > 0).any(axis=0))[grams]
        start, grams = start[shared], grams[shared]


def lengths_of(sides: Sequence[Sequence[Tokens]]) -> NDArray[np.int64]:
    """Return the number of tokens of every text, (sides × examples)."""
    return np.array([[len(text) for text in side] for side in sides], np.int64)


def _flattened(sides: Sequence[Sequence[Tokens]]) -> _Flat:
    lengths = lengths_of(sides).reshape(-1)
    ends = np.repeat(np.cumsum(lengths), lengths)
    text = np.repeat(np.arange(len(lengths)), lengths)
    side, example = np.divmod(text, max(1, len(sides[0])))
    tokens = np.concatenate([text for texts in sides for text in texts])
    return _Flat(tokens, side, example, ends - np.arange(len(tokens)))
