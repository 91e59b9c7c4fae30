"""Metrics of a whole file at once: sacrebleu's BLEU and chrF over all references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lorakit.scoring.languages import language, words
from lorakit.scoring.statistics import References, Row, Statistics

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as SacrebleuMetric

    from lorakit.scoring.statistics import Array


def bleu(predictions: Sequence[str], references: References, lang: str) -> Statistics:
    """Return sacrebleu's BLEU over all references, tokenised as the language asks.

    Japanese is cut by segmentation's words first (sacrebleu's own needs another MeCab binding).
    """
    from sacrebleu.metrics.bleu import BLEU

    from lorakit.scoring.corpus_values import bleu_values

    if lang != "ja":  # force: no hint in the log that the text looks tokenised
        judge = BLEU(tokenize="zh" if lang == "zh" else "13a", force=True)
        return _sacrebleu(judge, bleu_values, predictions, references)
    predictions = [_spaced(text, lang) for text in predictions]
    references = [[_spaced(text, lang) for text in listed] for listed in references]
    return _sacrebleu(
        BLEU(tokenize="none", force=True),
        bleu_values,
        predictions,
        references,
        note=f"|segmenter:{language(lang).tokenizer()}",
    )


def _spaced(text: str, lang: str) -> str:
    return " ".join(words(text, lang=lang))


def chrf(predictions: Sequence[str], references: References, lang: str) -> Statistics:
    """Return sacrebleu's chrF2 over all references; it needs no words, so the language is open.

    Of references with equal F, 0 above all, sacrebleu counts the n-grams of the first listed.
    """
    from sacrebleu.metrics.chrf import CHRF

    from lorakit.scoring.corpus_values import chrf_values

    return _sacrebleu(CHRF(), chrf_values, predictions, references)


def _sacrebleu(
    metric: SacrebleuMetric,
    values_of: Callable[[Array, int], Array],
    predictions: Sequence[str],
    references: References,
    note: str = "",
) -> Statistics:
    """Return a sacrebleu metric's own rows, value and signature.

    sacrebleu wants one stream per reference number, with None where an example has fewer. Its rows
    and their value have no public name; its corpus_score is these two calls.
    """
    most = max(map(len, references))
    padded = [[*listed, *[None] * (most - len(listed))] for listed in references]
    streams = list(zip(*padded, strict=True))
    rows = metric._extract_corpus_statistics(predictions, streams)

    def value_of(total: Row, count: int) -> float:
        return float(metric._compute_score_from_stats(list(total)).score)

    return Statistics(rows, value_of, values_of, f"{metric.get_signature()}{note}")
