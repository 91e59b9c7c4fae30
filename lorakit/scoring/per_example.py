"""Metrics that are means over examples: of the best over the references of each.

Comparisons of answers, ROUGE, BERTScore, and what an output has in common with another system's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.scoring.answers import contains_label, token_f1
from lorakit.scoring.languages import language, words
from lorakit.scoring.statistics import MetricFunction, References, Row, Statistics
from lorakit.versions import version_of

if TYPE_CHECKING:
    from lorakit.scoring.bertscore import Embedder
    from lorakit.scoring.statistics import Array

Comparison = Callable[[str, str, str], float]


def _mean(total: Row, count: int) -> float:
    return 100 * total[0] / count


def _means(totals: Array, count: int) -> Array:
    return 100 * totals[:, 0] / count


def best_reference(compare: Comparison, notes: str) -> MetricFunction:
    """Return the metric whose value is the mean over examples of the best over references.

    `notes` go into the signature; {norm}, {tok} and {match} in it depend on the language.
    """

    def statistics(predictions: Sequence[str], references: References, lang: str) -> Statistics:
        pairs = zip(predictions, references, strict=True)
        rows = [[max(compare(text, other, lang) for other in listed)] for text, listed in pairs]
        signature = (
            f"nrefs:{_number_of(references)}|refs:max|{notes.format_map(_notes(lang))}"
            f"|lang:{lang}|version:lorakit-{version_of('lorakit')}"
        )
        return Statistics(rows, _mean, _means, signature)

    return statistics


def _notes(lang: str) -> dict[str, str]:
    spaced = language(lang).spaced
    return {
        "norm": "squad" if spaced else "nfkc+lower+nopunct",
        "tok": language(lang).tokenizer(),
        "match": "words" if spaced else "substring",
    }


def contains_other(
    predictions: Sequence[str], references: References, others: Sequence[str], lang: str
) -> Statistics:
    """Return the share of outputs that contain the other system's output, as `contains` does."""
    return best_reference(contains_label, "norm:{norm}|match:{match}")(
        predictions, [[other] for other in others], lang
    )


def contains_other_where_worse(
    predictions: Sequence[str], references: References, others: Sequence[str], lang: str
) -> Statistics:
    """Return that share among the examples whose F1 is lower than the other's (section 6.7)."""
    ours, theirs = (
        best_reference(token_f1, "")(texts, references, lang).rows
        for texts in (predictions, others)
    )
    found = contains_other(predictions, references, others, lang)
    worse = [float(mine[0] < other[0]) for mine, other in zip(ours, theirs, strict=True)]
    rows = [[low * row[0], low] for low, row in zip(worse, found.rows, strict=True)]
    signature = f"{found.signature}|where:f1-below-baseline"
    return Statistics(rows, _share, _shares, signature)


def _share(total: Row, count: int) -> float:
    return 100 * total[0] / total[1] if total[1] else 0.0


def _shares(totals: Array, count: int) -> Array:
    none = totals[:, 1] == 0
    shares: Array = ~none * (100 * totals[:, 0] / (totals[:, 1] + none))
    return shares


def _number_of(references: References) -> str:
    """Return how many references each example has, or `var`, as sacrebleu writes it."""
    counts = {len(listed) for listed in references}
    return str(counts.pop()) if len(counts) == 1 else "var"


@dataclass(frozen=True)
class _WordsOf:
    """What rouge_score asks of a tokenizer, for languages other than its own."""

    lang: str

    def tokenize(self, text: str) -> list[str]:
        return words(text, lang=self.lang)


def rouge(kind: str, predictions: Sequence[str], references: References, lang: str) -> Statistics:
    """Return rouge_score's F-measure of each example: the best over references, no stemmer.

    English goes through rouge_score's default tokenizer, which drops all that is not ASCII; other
    languages through segmentation's words, as written. `rougeLsum` takes lines for sentences.
    """
    from rouge_score.rouge_scorer import RougeScorer

    spaced = language(lang).spaced
    scorer = RougeScorer([kind], use_stemmer=False, tokenizer=None if spaced else _WordsOf(lang))
    rows = [
        [float(scorer.score_multi(listed, text)[kind].fmeasure)]
        for text, listed in zip(predictions, references, strict=True)
    ]
    tokenizer = "rouge_score-default" if spaced else language(lang).tokenizer()
    sentences = "|sentences:lines" if kind == "rougeLsum" else ""
    signature = (
        f"nrefs:{_number_of(references)}|refs:max|measure:f1|stemmer:no|tok:{tokenizer}{sentences}"
        f"|lang:{lang}|version:rouge_score-{version_of('rouge_score')}"
    )
    return Statistics(rows, _mean, _means, signature)


def bertscore(
    predictions: Sequence[str], references: References, lang: str, embedder: Embedder
) -> Statistics:
    """Return BERTScore's F1 of each example: the best over references, no idf, not rescaled."""
    from lorakit.scoring.bertscore import best_f1s

    rows = [[value] for value in best_f1s(predictions, references, embedder)]
    signature = (
        f"nrefs:{_number_of(references)}|refs:max|measure:f1|idf:no|rescaled:no"
        f"|{embedder.signature}|version:lorakit-{version_of('lorakit')}"
    )
    return Statistics(rows, _mean, _means, signature)
