"""Metrics: how far predictions agree with their references, in percent.

Every metric is two steps, so that a significance test can draw examples again without scoring them
again: a row of numbers per example (its sufficient statistics), and a value computed from the sum
of the rows and their number. It knows nothing of files and commands.

A metric is added as one function and one line in METRICS: a comparison of one prediction with one
reference, `(prediction, reference, lang) -> 0..1`, wrapped in `best_reference`, which takes the
best over the references and the mean over the examples; or a function that returns Statistics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.answers import (
    contains_label,
    exact_match,
    final_number_match,
    first_words_match,
    token_f1,
)
from lorakit.errors import LorakitError
from lorakit.segmentation import language, words
from lorakit.versions import version_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sacrebleu.metrics.base import Metric as SacrebleuMetric

    from lorakit.bertscore import Embedder

    Array = NDArray[np.float64]

Row = Sequence[float]
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Score:
    """One number about one system: percent, the number of examples, and how it was computed."""

    name: str
    value: float
    count: int
    signature: str


@dataclass(frozen=True)
class Statistics:
    """The sufficient statistics of one system under one metric.

    `rows` has one row of the same length per example; `value_of(total, count)` is the metric's
    value, in percent, for any multiset of `count` examples whose rows add up to `total`, and
    `values_of(totals, count)` the same values (n) of many such totals (n × length of a row).
    """

    rows: Sequence[Row]
    value_of: Callable[[Row, int], float]
    values_of: Callable[[Array, int], Array]
    signature: str

    @property
    def value(self) -> float:
        total = [math.fsum(column) for column in zip(*self.rows, strict=True)]
        return self.value_of(total, len(self.rows))


MetricFunction = Callable[[Sequence[str], References, str], Statistics]
EmbeddingMetric = Callable[[Sequence[str], References, str, "Embedder"], Statistics]
ComparingMetric = Callable[[Sequence[str], References, Sequence[str], str], Statistics]
Comparison = Callable[[str, str, str], float]


@dataclass(frozen=True)
class Metric:
    """An entry of METRICS; `reads` is what a text must hold for the metric to see anything.

    `ascii` means words of ASCII letters where the language is written with spaces. `embedded` is
    the function of a metric that needs a model; `statistics` then says that there is none.
    `compared` is that of one that looks at another system's outputs: (predictions, references,
    the other's predictions, lang); `statistics` then says that there is no other.
    """

    help: str
    statistics: MetricFunction
    reads: Literal["words", "ascii", "characters", "numbers"] = "words"
    higher_is_better: bool = True
    embedded: EmbeddingMetric | None = None
    compared: ComparingMetric | None = None

    @property
    def is_alone(self) -> bool:
        """Whether predictions and references are all it needs."""
        return self.embedded is None and self.compared is None


# — means over examples —


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


def _needs_other(predictions: Sequence[str], references: References, lang: str) -> Statistics:
    raise LorakitError("contains-baseline compares with another system; give it by --baseline")


def _number_of(references: References) -> str:
    """Return how many references each example has, or `var`, as sacrebleu writes it."""
    counts = {len(listed) for listed in references}
    return str(counts.pop()) if len(counts) == 1 else "var"


# — ROUGE —


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


# — sacrebleu —


def bleu(predictions: Sequence[str], references: References, lang: str) -> Statistics:
    """Return sacrebleu's BLEU over all references, tokenised as the language asks.

    Japanese is cut by segmentation's words first (sacrebleu's own needs another MeCab binding).
    """
    from sacrebleu.metrics.bleu import BLEU

    from lorakit.corpus_values import bleu_values

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

    from lorakit.corpus_values import chrf_values

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


# — BERTScore —


def bertscore(
    predictions: Sequence[str], references: References, lang: str, embedder: Embedder
) -> Statistics:
    """Return BERTScore's F1 of each example: the best over references, no idf, not rescaled."""
    from lorakit.bertscore import best_f1s

    rows = [[value] for value in best_f1s(predictions, references, embedder)]
    signature = (
        f"nrefs:{_number_of(references)}|refs:max|measure:f1|idf:no|rescaled:no"
        f"|{embedder.signature}|version:lorakit-{version_of('lorakit')}"
    )
    return Statistics(rows, _mean, _means, signature)


def without_a_model(predictions: Sequence[str], references: References, lang: str) -> Statistics:
    """Stand in for a metric that needs a model, where none was given."""
    raise LorakitError("this metric needs a model to embed tokens; use `lorakit score`")


METRICS: dict[str, Metric] = {
    "rouge1": Metric("ROUGE-1: words shared.", functools.partial(rouge, "rouge1"), "ascii"),
    "rouge2": Metric(
        "ROUGE-2: pairs of words shared.", functools.partial(rouge, "rouge2"), "ascii"
    ),
    "rougeL": Metric(
        "ROUGE-L: longest common subsequence.", functools.partial(rouge, "rougeL"), "ascii"
    ),
    "rougeLsum": Metric(
        "ROUGE-L of summaries with one sentence a line.",
        functools.partial(rouge, "rougeLsum"),
        "ascii",
    ),
    "bleu": Metric("BLEU of the whole file (sacrebleu).", bleu),
    "chrf": Metric("chrF2 of the whole file (sacrebleu).", chrf, "characters"),
    "em": Metric(
        "Output equals label, normalised as in SQuAD.", best_reference(exact_match, "norm:{norm}")
    ),
    "f1": Metric(
        "Words shared with the label (SQuAD, HotpotQA).",
        best_reference(token_f1, "norm:{norm}|tok:{tok}|yesno:hotpotqa"),
    ),
    "contains": Metric(
        "Output contains the label.",
        best_reference(contains_label, "norm:{norm}|match:{match}"),
    ),
    "accuracy": Metric(
        "Output begins with the label.",
        best_reference(first_words_match, "norm:{norm}|tok:{tok}|match:first-words"),
    ),
    "gsm8k": Metric(
        "Final number equals the label's (GSM8K).",
        best_reference(final_number_match, "number:after-####-or-last"),
        "numbers",
    ),
    "bertscore": Metric(
        "BERTScore: tokens matched by a model (slow).",
        without_a_model,
        "characters",
        embedded=bertscore,
    ),
    "contains-baseline": Metric(
        "Output contains --baseline's output.", _needs_other, compared=contains_other
    ),
    "contains-baseline-worse": Metric(
        "The same, where its F1 is below --baseline's.",
        _needs_other,
        compared=contains_other_where_worse,
    ),
}


def statistics(
    predictions: Sequence[str],
    references: References,
    *,
    metric: str,
    lang: str = "en",
    embedder: Embedder | None = None,
    others: Sequence[str] | None = None,
) -> Statistics:
    """Return the rows, value and signature of one metric; `references` lists texts per example.

    `embedder` is needed by the metrics that embed tokens, `others`, a baseline's predictions, by
    those that compare with them, and neither by any other.

    Raises LorakitError for an unknown metric or language, for no examples, and where an example
    has no reference.
    """
    if metric not in METRICS:
        raise LorakitError(f"unknown metric {metric!r}; choose from {', '.join(METRICS)}")
    if not predictions or len(predictions) != len(references) or not all(references):
        raise LorakitError(
            f"{len(predictions)} predictions and {len(references)} lists of references; "
            "give each of one or more predictions one or more references"
        )
    language(lang)
    embedded = METRICS[metric].embedded
    if embedded is not None and embedder is not None:
        return embedded(predictions, references, lang, embedder)
    compared = METRICS[metric].compared
    if compared is not None and others is not None:
        return compared(predictions, references, others, lang)
    return METRICS[metric].statistics(predictions, references, lang)


def score(
    predictions: Sequence[str], references: References, *, metric: str, lang: str = "en"
) -> Score:
    """Return the score of predictions against the references of each; errors as in `statistics`."""
    found = statistics(predictions, references, metric=metric, lang=lang)
    return Score(metric, found.value, len(predictions), found.signature)
