"""BLEU and chrF of many corpora at once, from the sums of their rows.

A significance test asks for the values of thousands of corpora of which it has only the sums of
sacrebleu's statistics. These functions do sacrebleu's arithmetic on all of them, operation for
operation, so that every value is, to the last bit, the one sacrebleu gives for that sum alone. They
know the settings that metrics.py uses: BLEU of order 4 with exponential smoothing, chrF2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ORDER = 4
_LOG_OF_0 = -9999999999.0  # sacrebleu's
_BETA_SQUARED = 4


def bleu_values(totals: Array, count: int) -> Array:
    """Return BLEU in percent (n) for sums (n × 10) of sacrebleu's rows.

    A row is the length of the output and of the reference, then per order the n-grams that match
    and those of the output. `count` is not needed.
    """
    precisions = _smoothed(totals[:, 2 : 2 + _ORDER], totals[:, 2 + _ORDER :])
    pairs = zip(totals[:, 0].tolist(), totals[:, 1].tolist(), precisions.tolist(), strict=True)
    values = [_brevity(ours, theirs) * _geometric_mean(shares) for ours, theirs, shares in pairs]
    return np.where(totals[:, 2 : 2 + _ORDER].any(axis=1), values, 0.0)


def _smoothed(correct: Array, total: Array) -> Array:
    """Return the precisions in percent (n × 4); the k-th order without a match counts 2^-k."""
    halvings = 2.0 ** np.cumsum(correct == 0, axis=1)
    matches = np.where(correct == 0, 100.0, 100.0 * correct)
    share = matches / np.where(total == 0, 1.0, total * np.where(correct == 0, halvings, 1.0))
    return np.where(np.logical_and.accumulate(total > 0, axis=1), share, 0.0)


def _brevity(ours: float, theirs: float) -> float:
    if ours >= theirs:
        return 1.0
    return math.exp(1 - theirs / ours) if ours > 0 else 0.0


def _geometric_mean(shares: list[float]) -> float:
    return math.exp(sum([math.log(x) if x else _LOG_OF_0 for x in shares]) / _ORDER)


def chrf_values(totals: Array, count: int) -> Array:
    """Return chrF2 in percent (n) for sums (n × 18) of sacrebleu's rows; `count` is not needed.

    A row is, per order, the n-grams of the output, of the reference, and those in both. Precision
    and recall are means over the orders that both texts have.
    """
    precision, recall, orders = (np.zeros(len(totals)) for _ in range(3))
    for start in range(0, totals.shape[1], 3):
        ours, theirs, both = totals[:, start : start + 3].T
        there = (ours > 0) & (theirs > 0)
        precision += np.where(there, both / np.where(there, ours, 1.0), 0.0)
        recall += np.where(there, both / np.where(there, theirs, 1.0), 0.0)
        orders += there
    precision /= np.maximum(orders, 1)
    recall /= np.maximum(orders, 1)
    weighted = _BETA_SQUARED * precision + recall
    score = (1 + _BETA_SQUARED) * precision * recall / np.where(weighted > 0, weighted, 1.0)
    return 100 * score
