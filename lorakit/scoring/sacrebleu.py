"""Metrics of a whole file at once: sacrebleu's BLEU and chrF over all references.

sacrebleu computes a row of n-gram counts per example and the value of one corpus. A significance
test asks for the values of thousands of corpora, of each of which it has only the sum of the rows:
the second half of this file does sacrebleu's arithmetic on all of them at once, operation for
operation, so that every value equals, to the last bit, the one sacrebleu gives for that sum alone.
It supports these settings only: BLEU of order 4 with exponential smoothing, and chrF2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lorakit.scoring.languages import language, words
from lorakit.scoring.statistics import Examples, Row, Statistics

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as SacrebleuMetric

    from lorakit.scoring.statistics import Array

_ORDER = 4
_LOG_OF_0 = -9999999999.0  # sacrebleu's
_BETA_SQUARED = 4


def bleu(examples: Examples) -> Statistics:
    """Return sacrebleu's BLEU over all references, with the tokenizer for the language.

    Japanese is first cut into the words of languages.py: sacrebleu's own tokenizer needs another
    MeCab binding.
    """
    if examples.lang != "ja":  # force: no hint in the log that the text looks tokenised
        metric = BLEU(tokenize="zh" if examples.lang == "zh" else "13a", force=True)
        return _statistics(metric, _bleu_values, examples)
    segmented = replace(
        examples,
        predictions=_segmented(examples.predictions, examples.lang),
        references=[_segmented(texts, examples.lang) for texts in examples.references],
    )
    note = f"|segmenter:{language(examples.lang).tokenizer()}"
    return _statistics(BLEU(tokenize="none", force=True), _bleu_values, segmented, note)


def _segmented(texts: Sequence[str], lang: str) -> list[str]:
    """Return the texts with spaces between their words."""
    return [" ".join(words(text, lang=lang)) for text in texts]


def chrf(examples: Examples) -> Statistics:
    """Return sacrebleu's chrF2 over all references; it needs no words, so any language will do.

    Of references with equal F, 0 above all, sacrebleu counts the n-grams of the first listed.
    """
    return _statistics(CHRF(), _chrf_values, examples)


def _statistics(
    metric: SacrebleuMetric,
    values_of: Callable[[Array, int], Array],
    examples: Examples,
    note: str = "",
) -> Statistics:
    """Return a sacrebleu metric's own rows, value and signature.

    sacrebleu wants one stream per reference number, with None where an example has fewer. Its rows
    and their value have no public name; its corpus_score makes these two calls.
    """
    most = max(map(len, examples.references))
    padded = [[*texts, *[None] * (most - len(texts))] for texts in examples.references]
    streams = list(zip(*padded, strict=True))
    rows = metric._extract_corpus_statistics(examples.predictions, streams)

    def value_of(total: Row, count: int) -> float:
        return float(metric._compute_score_from_stats(list(total)).score)

    return Statistics(rows, value_of, values_of, f"{metric.get_signature()}{note}")


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
