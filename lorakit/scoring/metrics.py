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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.errors import LorakitError
from lorakit.scoring.answers import (
    contains_label,
    exact_match,
    final_number_match,
    first_words_match,
    token_f1,
)
from lorakit.scoring.languages import language
from lorakit.scoring.per_example import (
    bertscore,
    best_reference,
    contains_other,
    contains_other_where_worse,
    rouge,
)
from lorakit.scoring.sacrebleu import bleu, chrf
from lorakit.scoring.statistics import MetricFunction, References, Statistics

if TYPE_CHECKING:
    from lorakit.scoring.bertscore import Embedder

EmbeddingMetric = Callable[[Sequence[str], References, str, "Embedder"], Statistics]
ComparingMetric = Callable[[Sequence[str], References, Sequence[str], str], Statistics]


@dataclass(frozen=True)
class Score:
    """One number about one system: percent, the number of examples, and how it was computed."""

    name: str
    value: float
    count: int
    signature: str


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


def _needs_other(predictions: Sequence[str], references: References, lang: str) -> Statistics:
    raise LorakitError("contains-baseline compares with another system; give it by --baseline")


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
