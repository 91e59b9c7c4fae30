"""Metrics of a whole file at once: sacrebleu's BLEU and chrF over all references.

sacrebleu computes a row of n-gram counts per example and the value of one corpus. Here the counts
of many examples are taken at once (ngrams.py), and so are the values of many corpora: a
significance test asks for those of thousands, of each of which it has only the sum of the rows. The
second half of this file does sacrebleu's arithmetic on all of them, operation for operation. Rows
and values are, to the last bit, those that sacrebleu gives for each example and each sum alone.
These settings only are supported: BLEU of order 4 with exponential smoothing, and chrF2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lorakit.scoring.languages import language, words
from lorakit.scoring.ngrams import Tokens, characters, gram_counts, lengths_of, numbered
from lorakit.scoring.statistics import Examples, Row, Statistics

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sacrebleu.metrics.base import Metric as SacrebleuMetric

    from lorakit.scoring.statistics import Array

    Counts = NDArray[np.int64]
    Present = NDArray[np.bool_]  # whether an example has this reference, (references × examples)

_ORDER = 4
_LOG_OF_0 = -9999999999.0  # sacrebleu's
_CHARACTERS = 6  # the highest order of chrF
_BETA_SQUARED = 4
_EXAMPLES_AT_ONCE = 1 << 10

Sides = Sequence[Sequence[Tokens]]  # the outputs, then the first, second … reference of each


def bleu(examples: Examples) -> Statistics:
    """Return sacrebleu's BLEU over all references, with the tokenizer for the language.

    Japanese is first cut into the words of languages.py: sacrebleu's own tokenizer needs another
    MeCab binding.
    """
    names = {"ja": "none", "zh": "zh"}
    metric = BLEU(tokenize=names.get(examples.lang, "13a"))
    note = f"|segmenter:{language('ja').tokenizer()}" if examples.lang == "ja" else ""
    cut = functools.partial(_words, lang=examples.lang)
    return _statistics(metric, _bleu_rows, cut, _bleu_values, examples, note)


def _words(texts: Sequence[str], numbers: dict[str, int], lang: str) -> list[Tokens]:
    """Return the words of texts as numbers."""
    if lang == "ja":
        return numbered([" ".join(words(text, lang="ja")).split() for text in texts], numbers)
    tokenize = _tokenizer("zh" if lang == "zh" else "13a")
    return numbered([tokenize(text.rstrip()).split() for text in texts], numbers)


@functools.cache
def _tokenizer(name: str) -> Callable[[str], str]:
    """Return sacrebleu's tokenizer, which remembers the lines that it has cut: references above
    all, which every system has in common."""
    tokenizer: Callable[[str], str] = BLEU(tokenize=name).tokenizer
    return tokenizer


def chrf(examples: Examples) -> Statistics:
    """Return sacrebleu's chrF2 over all references; it needs no words, so any language will do.

    Of references with equal F, 0 above all, sacrebleu counts the n-grams of the first listed.
    """
    return _statistics(CHRF(), _chrf_rows, _characters, _chrf_values, examples)


def _characters(texts: Sequence[str], numbers: dict[str, int]) -> list[Tokens]:
    """Return the characters of texts, without white space, as numbers."""
    return [characters("".join(text.split())) for text in texts]


def _statistics(
    metric: SacrebleuMetric,
    rows_of: Callable[[Sides, Present], Counts],
    cut: Callable[[Sequence[str], dict[str, int]], list[Tokens]],
    values_of: Callable[[Array, int], Array],
    examples: Examples,
    note: str = "",
) -> Statistics:
    """Return the rows of a sacrebleu metric, and its own value and signature.

    The value of a sum of rows has no public name; its corpus_score makes this call. The signature
    tells the number of references, -1 where it varies.
    """
    rows: list[Row] = []
    for first in range(0, len(examples.predictions), _EXAMPLES_AT_ONCE):
        part = slice(first, first + _EXAMPLES_AT_ONCE)
        streams = _streams(examples.references[part])
        numbers: dict[str, int] = {}
        sides = [cut(texts, numbers) for texts in (examples.predictions[part], *streams)]
        counts = [len(listed) for listed in examples.references[part]]
        rows += rows_of(sides, np.arange(len(streams))[:, None] < counts).tolist()

    def value_of(total: Row, count: int) -> float:
        return float(metric._compute_score_from_stats(list(total)).score)

    listed_counts = {len(listed) for listed in examples.references}
    metric.num_refs = listed_counts.pop() if len(listed_counts) == 1 else -1
    return Statistics(rows, value_of, values_of, f"{metric.get_signature()}{note}")


def _streams(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the first, second … reference of every example, empty where it has fewer."""
    most = max(map(len, references))
    padded = [[*listed, *[""] * (most - len(listed))] for listed in references]
    return [list(stream) for stream in zip(*padded, strict=True)]


# — the rows of many examples at once —


def _bleu_rows(sides: Sides, present: Present) -> Counts:
    """Return sacrebleu's rows for BLEU (examples × 10).

    The output's length, that of the reference nearest in length, the shorter of two; then per order
    the n-grams that match, as often as the reference with most has them, and those of the output.
    """
    lengths = lengths_of(sides)
    ours, theirs = lengths[0], lengths[1:]
    rank = np.where(present, np.abs(theirs - ours) * (theirs.max() + 1) + theirs, np.inf)
    nearest = np.take_along_axis(theirs, rank.argmin(axis=0)[None], axis=0)[0]
    matches = [
        np.bincount(example, np.minimum(counts[0], counts[1:].max(axis=0)), len(ours))
        for example, counts in gram_counts(sides, _ORDER)
    ]
    totals = [np.maximum(ours - order, 0) for order in range(_ORDER)]
    return np.stack([ours, nearest, *matches, *totals], axis=1).astype(np.int64)


def _chrf_rows(sides: Sides, present: Present) -> Counts:
    """Return sacrebleu's rows for chrF (examples × 18): those of the reference with the best F.

    The n-grams of an output whose reference is too short to have any of an order do not count.
    """
    lengths = lengths_of(sides)
    rows = np.zeros((len(sides) - 1, len(sides[0]), 3 * _CHARACTERS), np.int64)
    for order, (example, counts) in enumerate(gram_counts(sides, _CHARACTERS)):
        ours, theirs = np.maximum(lengths[0] - order, 0), np.maximum(lengths[1:] - order, 0)
        rows[:, :, 3 * order] = ours * (theirs > 0)
        rows[:, :, 3 * order + 1] = theirs
        for reference, of_reference in zip(rows, counts[1:], strict=True):
            shared = np.bincount(example, np.minimum(counts[0], of_reference), len(ours))
            reference[:, 3 * order + 2] = shared
    values = np.array([_chrf_values(of_one, 1) for of_one in rows.astype(np.float64)])
    best = np.where(present, values, -1.0).argmax(axis=0)
    chosen: Counts = rows[best, np.arange(len(best))]
    return chosen


# — many corpora at once —


def _bleu_values(totals: Array, count: int) -> Array:
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
    shares = matches / np.where(total == 0, 1.0, total * np.where(correct == 0, halvings, 1.0))
    return np.where(np.logical_and.accumulate(total > 0, axis=1), shares, 0.0)


def _brevity(ours: float, theirs: float) -> float:
    """Return BLEU's penalty (0..1) for an output of `ours` words and a reference of `theirs`."""
    if ours >= theirs:
        return 1.0
    return math.exp(1 - theirs / ours) if ours > 0 else 0.0


def _geometric_mean(shares: list[float]) -> float:
    return math.exp(sum([math.log(share) if share else _LOG_OF_0 for share in shares]) / _ORDER)


def _chrf_values(totals: Array, count: int) -> Array:
    """Return chrF2 in percent (n) for sums (n × 18) of sacrebleu's rows; `count` is not needed.

    A row counts, per order, the n-grams of the output, of the reference, and shared. Precision and
    recall are means over the orders that both texts have.
    """
    precision, recall, orders = (np.zeros(len(totals)) for _ in range(3))
    for start in range(0, totals.shape[1], 3):
        ours, theirs, shared = totals[:, start : start + 3].T
        in_both = (ours > 0) & (theirs > 0)
        precision += np.where(in_both, shared / np.where(in_both, ours, 1.0), 0.0)
        recall += np.where(in_both, shared / np.where(in_both, theirs, 1.0), 0.0)
        orders += in_both
    precision /= np.maximum(orders, 1)
    recall /= np.maximum(orders, 1)
    weighted = _BETA_SQUARED * precision + recall
    score = (1 + _BETA_SQUARED) * precision * recall / np.where(weighted > 0, weighted, 1.0)
    return 100 * score
