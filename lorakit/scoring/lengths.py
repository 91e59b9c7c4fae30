"""How long outputs are: their words, and whether any follow a label.

These metrics describe outputs and make none better; they compare no output with a reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from lorakit.scoring.languages import language, normalise, words
from lorakit.scoring.per_example import language_notes, mean_over_examples
from lorakit.scoring.statistics import Examples, Row, Statistics
from lorakit.versions import version_of

if TYPE_CHECKING:
    from lorakit.scoring.statistics import Array


def length(examples: Examples) -> Statistics:
    """Return the mean number of words of an output, as --lang finds them.

    It is a number of words, not percent, and reads no reference. Between spaces (en), punctuation
    belongs to its word; MeCab (ja) and sacrebleu (zh) count it as a word of its own.
    """
    counts = [[float(len(words(text, lang=examples.lang)))] for text in examples.predictions]
    return Statistics(counts, _mean, _means, _signature("tok:{tok}", examples.lang))


def _mean(total: Row, count: int) -> float:
    return total[0] / count


def _means(totals: Array, count: int) -> Array:
    means: Array = totals[:, 0] / count
    return means


def words_beyond_label(examples: Examples) -> Statistics:
    """Return the share of outputs that begin with a label and go on after it.

    The labels are all references of the file, not the example's alone: in "No, the reply is off
    topic" words follow a label even where "Yes" is right, and the boundary paper's 13 % (section
    6.3, beside Table 4) are of all outputs. Texts are normalised as `accuracy` does it, so that
    punctuation is no further word; an output that is a longer label as a whole does not go on
    after the shorter one.
    """
    labels = {reference for listed in examples.references for reference in listed}
    plain, marks = _split_labels(labels, examples.lang)
    beyond = [
        float(plain.is_followed_in(text) or marks.is_followed_in(text))
        for text in examples.predictions
    ]
    notes = "labels:references-of-file|norm:{norm}+articles|tok:{tok}"
    return mean_over_examples(beyond, _signature(notes, examples.lang))


@dataclass(frozen=True)
class _Labels:
    """Normalised labels, each as one text, so that it is found however it was cut into words."""

    texts: frozenset[str]
    longest: int
    lang: str
    punctuation: bool

    def is_followed_in(self, text: str) -> bool:
        """Return whether a text begins with a label and has further words, but is no label."""
        if not self.texts:
            return False
        found = _words(text, self.lang, punctuation=self.punctuation)
        if _gap(self.lang).join(found) in self.texts:
            return False
        for prefix in accumulate(found[:-1], lambda *parts: _gap(self.lang).join(parts)):
            if prefix in self.texts:
                return True
            if len(prefix) > self.longest:
                return False
        return False


def _split_labels(labels: set[str], lang: str) -> tuple[_Labels, _Labels]:
    """Return the labels without punctuation, and those like "+" that are nothing else, with it."""
    plain = {label: _words(label, lang, punctuation=False) for label in labels}
    marks = [_words(label, lang, punctuation=True) for label, parts in plain.items() if not parts]
    return (
        _labels(plain.values(), lang, punctuation=False),
        _labels(marks, lang, punctuation=True),
    )


def _labels(listed: Iterable[Sequence[str]], lang: str, *, punctuation: bool) -> _Labels:
    texts = frozenset(_gap(lang).join(parts) for parts in listed if parts)
    return _Labels(texts, max(map(len, texts), default=0), lang, punctuation)


def _words(text: str, lang: str, *, punctuation: bool) -> list[str]:
    return words(normalise(text, lang=lang, articles=True, punctuation=punctuation), lang=lang)


def _gap(lang: str) -> str:
    """Return what stands between the words of a language."""
    return " " if language(lang).spaced else ""


def _signature(notes: str, lang: str) -> str:
    """Return the signature of a metric that compares with no reference."""
    filled = notes.format_map(language_notes(lang))
    return f"{filled}|lang:{lang}|version:lorakit-{version_of('lorakit')}"
