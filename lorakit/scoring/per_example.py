"""Metrics that average the scores of single examples: answers, ROUGE, BERTScore.

Those of what an output shares with a baseline's are here, too. Where an example has several
references, the best counts. Metrics of a whole file are in sacrebleu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lorakit.errors import LorakitError
from lorakit.scoring.answers import contains_label, token_f1
from lorakit.scoring.languages import language, words
from lorakit.scoring.statistics import Examples, Row, Statistics, TextComparison
from lorakit.versions import version_of

if TYPE_CHECKING:
    from lorakit.scoring.statistics import Array


def mean_over_examples(values: Iterable[float], signature: str) -> Statistics:
    """Return the statistics of a metric that is the mean of one number (0..1) per example."""
    return Statistics([[value] for value in values], _mean, _means, signature)


def _mean(total: Row, count: int) -> float:
    return 100 * total[0] / count


def _means(totals: Array, count: int) -> Array:
    return 100 * totals[:, 0] / count


def best_reference(examples: Examples, *, compare: TextComparison, notes: str) -> Statistics:
    """Return the mean over examples of the best comparison with any of the references.

    `notes` go into the signature; {norm}, {tok} and {match} in them depend on the language.
    """
    lang = examples.lang
    best = _best_of(compare, examples.predictions, examples)
    signature = (
        f"nrefs:{examples.reference_count}|refs:max|{notes.format_map(language_notes(lang))}"
        f"|lang:{lang}|version:lorakit-{version_of('lorakit')}"
    )
    return mean_over_examples(best, signature)


def language_notes(lang: str) -> dict[str, str]:
    """Return what a comparison's signature says of a language: its normalisation and words."""
    spaced = language(lang).spaced
    return {
        "norm": "squad" if spaced else "nfkc+lower+nopunct",
        "tok": language(lang).tokenizer(),
        "match": "words" if spaced else "substring",
    }


def contains_baseline(examples: Examples) -> Statistics:
    """Return the share of outputs that contain the baseline's output, as `contains` does.

    Raises LorakitError where there is no baseline.
    """
    outputs = [[output] for output in _baseline_predictions(examples)]
    return best_reference(
        Examples(examples.predictions, outputs, examples.lang),
        compare=contains_label,
        notes="norm:{norm}|match:{match}",
    )


def contains_baseline_where_worse(examples: Examples) -> Statistics:
    """Return the same share over the examples whose F1 is below the baseline's (section 6.7).

    Raises LorakitError where there is no baseline.
    """
    return _contained_among(examples, _worse_than_baseline(examples), "f1-below-baseline")


def contains_baseline_where_both_correct(examples: Examples) -> Statistics:
    """Return the share among those examples where both outputs are correct, as in section 6.7.

    Correct means that the output contains a reference, as `contains` does: under `em`, an output
    whose F1 is below the baseline's could not be correct at all. The paper's "when both methods
    produce correct answers, this overlap increases to 96%" is of its cases with a lower F1, and so
    is this. 0 where there is no such example. Raises LorakitError where there is no baseline.
    """
    among = zip(
        _worse_than_baseline(examples),
        _best_of(contains_label, examples.predictions, examples),
        _best_of(contains_label, _baseline_predictions(examples), examples),
        strict=True,
    )
    members = [worse and bool(ours and theirs) for worse, ours, theirs in among]
    return _contained_among(examples, members, "f1-below-baseline+both-contain-label")


def _contained_among(examples: Examples, members: Sequence[bool], where: str) -> Statistics:
    """Return the share of outputs that contain the baseline's among some of the examples."""
    contained = contains_baseline(examples)
    pairs = zip(members, contained.rows, strict=True)
    rows = [[float(member) * row[0], float(member)] for member, row in pairs]
    return Statistics(rows, _share, _shares, f"{contained.signature}|where:{where}")


def _worse_than_baseline(examples: Examples) -> list[bool]:
    """Return of each example whether its F1 is lower than the baseline's."""
    ours = _best_of(token_f1, examples.predictions, examples)
    theirs = _best_of(token_f1, _baseline_predictions(examples), examples)
    return [our_f1 < their_f1 for our_f1, their_f1 in zip(ours, theirs, strict=True)]


def _baseline_predictions(examples: Examples) -> Sequence[str]:
    if examples.baseline_predictions is None:
        raise LorakitError("contains-baseline compares with another system; give it by --baseline")
    return examples.baseline_predictions


def _best_of(
    compare: TextComparison, predictions: Sequence[str], examples: Examples
) -> list[float]:
    """Return the comparison of each of these predictions with its best reference."""
    pairs = zip(predictions, examples.references, strict=True)
    return [
        max(compare(text, reference, examples.lang) for reference in listed)
        for text, listed in pairs
    ]


def _share(total: Row, count: int) -> float:
    """Return the share in percent of the examples that count, 0 where none does."""
    return 100 * total[0] / total[1] if total[1] else 0.0


def _shares(totals: Array, count: int) -> Array:
    empty = totals[:, 1] == 0
    shares: Array = ~empty * (100 * totals[:, 0] / (totals[:, 1] + empty))
    return shares


@dataclass(frozen=True)
class _LanguageTokenizer:
    """A tokenizer as rouge_score wants it, for languages other than its own."""

    lang: str

    def tokenize(self, text: str) -> list[str]:
        return words(text, lang=self.lang)


class _Tokenizer(Protocol):
    """What cuts a text into words, as rouge_score calls it."""

    def tokenize(self, text: str) -> list[str]: ...


def _rouge(kind: str, examples: Examples) -> Statistics:
    """Return rouge_score's F-measure of each example: the best over references, no stemmer.

    English goes through rouge_score's default tokenizer, which drops all that is not ASCII; other
    languages through the words of languages.py, as written. `rougeLsum` takes lines for sentences.
    """
    from rouge_score.rouge_scorer import RougeScorer

    lang = language(examples.lang)
    own_tokenizer = None if lang.spaced else _LanguageTokenizer(examples.lang)
    scorer = RougeScorer([kind], use_stemmer=False, tokenizer=own_tokenizer)
    if kind == "rougeL":
        best = _best_rouge_l(examples, scorer._tokenizer)
    else:
        pairs = zip(examples.predictions, examples.references, strict=True)
        best = [float(scorer.score_multi(listed, text)[kind].fmeasure) for text, listed in pairs]
    tokenizer = "rouge_score-default" if lang.spaced else lang.tokenizer()
    sentences = "|sentences:lines" if kind == "rougeLsum" else ""
    signature = (
        f"nrefs:{examples.reference_count}|refs:max|measure:f1|stemmer:no|tok:{tokenizer}"
        f"{sentences}|lang:{examples.lang}|version:rouge_score-{version_of('rouge_score')}"
    )
    return mean_over_examples(best, signature)


def _best_rouge_l(examples: Examples, tokenizer: _Tokenizer) -> list[float]:
    """Return each example's best F-measure of ROUGE-L: rouge_score's, without its table of lengths.

    For two texts of a hundred words each that table is ten thousand steps in Python.
    """
    best = []
    for text, listed in zip(examples.predictions, examples.references, strict=True):
        ours = tokenizer.tokenize(text)
        best.append(max(_rouge_l_of(ours, tokenizer.tokenize(other)) for other in listed))
    return best


def _rouge_l_of(ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Return the F-measure of the longest common subsequence of two texts' words."""
    from rouge_score.scoring import fmeasure

    if not ours or not theirs:
        return 0.0
    length = _common_length(ours, theirs)
    return float(fmeasure(length / len(ours), length / len(theirs)))


def _common_length(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two sequences of words.

    Row by row of the usual table, of which a bit that is 0 says that the length grows by 1 from one
    word of `theirs` to the next; so a row is one number, and one addition carries all its changes.
    Source: Hyyrö, 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: dict[str, int] = {}
    for place, word in enumerate(theirs):
        places[word] = places.get(word, 0) | 1 << place
    everywhere = (1 << len(theirs)) - 1
    level = everywhere
    for word in ours:
        matches = level & places.get(word, 0)
        level = (level + matches | level - matches) & everywhere
    return len(theirs) - level.bit_count()


rouge1 = functools.partial(_rouge, "rouge1")
rouge2 = functools.partial(_rouge, "rouge2")
rouge_l = functools.partial(_rouge, "rougeL")
rouge_lsum = functools.partial(_rouge, "rougeLsum")


def bertscore(examples: Examples) -> Statistics:
    """Return BERTScore's F1 of each example: the best over references, no idf, not rescaled.

    Raises LorakitError where the examples have no embedder.
    """
    from lorakit.scoring.bertscore import best_f1s

    embedder = examples.embedder
    if embedder is None:
        raise LorakitError("this metric needs a model to embed tokens; use `lorakit score`")
    signature = (
        f"nrefs:{examples.reference_count}|refs:max|measure:f1|idf:no|rescaled:no"
        f"|{embedder.signature}|version:lorakit-{version_of('lorakit')}"
    )
    best = best_f1s(examples.predictions, examples.references, embedder, examples.saved)
    return mean_over_examples(best, signature)
