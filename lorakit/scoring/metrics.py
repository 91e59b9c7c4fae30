"""Metrics: how far predictions agree with their references, in percent; how long they are.

To add a metric, write one function and one line in METRICS. The function either takes Examples and
returns Statistics, or compares one prediction with one reference, `(prediction, reference, lang) ->
0..1`; the metric is then the mean over the examples of the best over the references. The table
names functions by their module, which is imported when the metric is used: `--help` needs none of
them. This file knows nothing of other systems, files and commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.errors import LorakitError
from lorakit.scoring.languages import language
from lorakit.scoring.statistics import (
    Examples,
    MetricFunction,
    References,
    Statistics,
    TextComparison,
)

if TYPE_CHECKING:
    from lorakit.runs.resume import SavedValues
    from lorakit.scoring.bertscore import Embedder

Reads = Literal["words", "ascii", "characters", "numbers"]


@dataclass(frozen=True)
class Score:
    """One number about one system: its value in percent (of `length`: in words), the number of
    examples, and how it was computed.
    """

    name: str
    value: float
    count: int
    signature: str


@dataclass(frozen=True)
class Metric:
    """One metric: a line of help, and its function, named by its module in this folder.

    `reads` is what a text must hold for the metric to see anything; `ascii` means words of ASCII
    letters where the language is written with spaces. With `notes` the function compares one
    prediction with one reference, and the notes are that comparison's part of the signature, in
    which {norm}, {tok} and {match} depend on the language. `needs` says what the metric reads
    besides predictions and references: a model that embeds tokens, or a baseline's predictions.
    `higher_is_better` is None where a number describes outputs and makes none better: it decides
    nothing. `per_example` is False for a value of the whole file, of which no example has its own.
    """

    help: str
    implementation: str
    reads: Reads = "words"
    notes: str | None = None
    needs: Literal["texts", "model", "baseline"] = "texts"
    higher_is_better: bool | None = True
    per_example: bool = True

    @property
    def decides(self) -> bool:
        """Whether the metric says which of two systems is better, and from their texts alone."""
        return self.needs == "texts" and self.higher_is_better is not None

    @property
    def function(self) -> MetricFunction:
        """The function from Examples to Statistics; its module is imported now."""
        import functools
        import importlib

        module, _, name = self.implementation.rpartition(".")
        implementation = getattr(importlib.import_module(f"lorakit.scoring.{module}"), name)
        if self.notes is None:
            whole: MetricFunction = implementation
            return whole
        from lorakit.scoring.per_example import best_reference

        compare: TextComparison = implementation
        return functools.partial(best_reference, compare=compare, notes=self.notes)


def _answer(text: str, comparison: str, notes: str, reads: Reads = "words") -> Metric:
    """Return the metric of a comparison of one answer with one label."""
    return Metric(text, f"answers.{comparison}", reads, notes)


METRICS: dict[str, Metric] = {
    "rouge1": Metric("ROUGE-1: words shared.", "per_example.rouge1", "ascii"),
    "rouge2": Metric("ROUGE-2: pairs of words shared.", "per_example.rouge2", "ascii"),
    "rougeL": Metric("ROUGE-L: longest common subsequence.", "per_example.rouge_l", "ascii"),
    "rougeLsum": Metric(
        "ROUGE-L of summaries with one sentence a line.", "per_example.rouge_lsum", "ascii"
    ),
    "bleu": Metric("BLEU of the whole file (sacrebleu).", "sacrebleu.bleu", per_example=False),
    "chrf": Metric(
        "chrF2 of the whole file (sacrebleu).", "sacrebleu.chrf", "characters", per_example=False
    ),
    "em": _answer("Output equals label, normalised as in SQuAD.", "exact_match", "norm:{norm}"),
    "f1": _answer(
        "Words shared with the label (SQuAD, HotpotQA).",
        "token_f1",
        "norm:{norm}|tok:{tok}|yesno:hotpotqa",
    ),
    "contains": _answer(
        "Output contains the label.", "contains_label", "norm:{norm}|match:{match}"
    ),
    "accuracy": _answer(
        "Output begins with the label.",
        "first_words_match",
        "norm:{norm}|tok:{tok}|match:first-words",
    ),
    "gsm8k": _answer(
        "Final number equals the label's (GSM8K).",
        "final_number_match",
        "number:after-####-or-last",
        "numbers",
    ),
    "bertscore": Metric(
        "BERTScore: tokens matched by a model (slow).",
        "per_example.bertscore",
        "characters",
        needs="model",
    ),
    "contains-baseline": Metric(
        "Output contains --baseline's output.", "per_example.contains_baseline", needs="baseline"
    ),
    "contains-baseline-worse": Metric(
        "The same, where its F1 is below --baseline's.",
        "per_example.contains_baseline_where_worse",
        needs="baseline",
    ),
    "contains-baseline-both-correct": Metric(
        "The same, where both contain the label, too.",
        "per_example.contains_baseline_where_both_correct",
        needs="baseline",
        higher_is_better=None,
    ),
    "words-beyond-label": Metric(
        "Output is a label and words after it.",
        "lengths.words_beyond_label",
        higher_is_better=None,
    ),
    "length": Metric(
        "Words of an output: a number, not percent.", "lengths.length", higher_is_better=None
    ),
}


def compute_statistics(
    predictions: Sequence[str],
    references: References,
    *,
    metric: str,
    lang: str = "en",
    embedder: Embedder | None = None,
    baseline_predictions: Sequence[str] | None = None,
    saved: SavedValues | None = None,
) -> Statistics:
    """Return the rows, value and signature of one metric; `references` lists texts per example.

    `embedder` is read by metrics that need a model, `baseline_predictions` by those that need a
    baseline, and neither by any other; slow metrics add to `saved` what they compute. Raises
    LorakitError for an unknown metric or language, for no examples, where an example has no
    reference, and where the metric lacks what it needs.
    """
    if metric not in METRICS:
        raise LorakitError(f"unknown metric {metric!r}; choose from {', '.join(METRICS)}")
    if not predictions or len(predictions) != len(references) or not all(references):
        raise LorakitError(
            f"{len(predictions)} predictions and {len(references)} lists of references; "
            "give each of one or more predictions one or more references"
        )
    language(lang)  # an unknown one is an error for every metric
    examples = Examples(predictions, references, lang, embedder, baseline_predictions, saved)
    return METRICS[metric].function(examples)


def score(
    predictions: Sequence[str], references: References, *, metric: str, lang: str = "en"
) -> Score:
    """Return the score of predictions against the references of each.

    Raises LorakitError as `compute_statistics` does.
    """
    statistics = compute_statistics(predictions, references, metric=metric, lang=lang)
    return Score(metric, statistics.value, len(predictions), statistics.signature)
