"""Compare one short answer with one label: equal, contained, first, shared words, final number.

Each comparison is `(prediction, reference, lang) -> 0..1`; metrics.py makes metrics of them. This
file knows nothing of corpora. An empty prediction, or an empty label, scores 0.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator
from decimal import Decimal

from lorakit.scoring.languages import language, normalise, words


def exact_match(prediction: str, reference: str, lang: str) -> float:
    """Return 1 where both texts are the same after SQuAD's normalisation, else 0."""
    text, label = _comparable(prediction, reference, lang)
    return float(bool(label) and _joined(text, lang) == _joined(label, lang))


def contains_label(prediction: str, reference: str, lang: str) -> float:
    """Return 1 where the normalised output contains the normalised label, else 0.

    The label must be found as whole words; in languages without spaces a substring is enough.
    """
    text, label = _comparable(prediction, reference, lang)
    if not language(lang).spaced:
        return float(bool(label) and _joined(label, lang) in _joined(text, lang))
    return float(bool(label) and f" {label} " in f" {text} ")


def first_words_match(prediction: str, reference: str, lang: str) -> float:
    """Return 1 where the output's first word is the label (of n words: its first n words), else 0.

    Words are counted before articles are removed, so that "A B" does not begin with "B".
    """
    for punctuation in (False, True):
        text, label = (
            words(normalise(raw, lang=lang, articles=True, punctuation=punctuation), lang=lang)
            for raw in (prediction, reference)
        )
        if label:
            return exact_match(" ".join(text[: len(label)]), reference, lang)
    return 0.0


_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def token_f1(prediction: str, reference: str, lang: str) -> float:
    """Return SQuAD's F1 of shared words, 0 where only one side is yes, no or noanswer.

    The second rule is HotpotQA's own (its published evaluation).
    """
    text, label = _comparable(prediction, reference, lang)
    if text != label and not _CLOSED_ANSWERS.isdisjoint((text, label)):
        return 0.0
    ours, theirs = words(text, lang=lang), words(label, lang=lang)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def _comparable(prediction: str, reference: str, lang: str) -> tuple[str, str]:
    """Return both texts normalised in the same way, which leaves something of the reference.

    SQuAD's rule would leave nothing of the labels "A" or "+"; in such cases articles, and if need
    be punctuation, stay in both texts.
    """
    for keep in ({}, {"articles": True}, {"articles": True, "punctuation": True}):
        label = normalise(reference, lang=lang, **keep)
        if label:
            return normalise(prediction, lang=lang, **keep), label
    return prediction, ""


def _joined(text: str, lang: str) -> str:
    """Return the text without spaces in languages that are written without them."""
    return text if language(lang).spaced else text.replace(" ", "")


_NUMBER = re.compile(
    r"(?P<sign>(?:(?<![\w)\]])[-−])?(?:[$€£¥]-?)?)"  # the minus of 20-5 is no sign
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
)
_MARK = "####"


def final_number(text: str) -> Decimal | None:
    """Return the first number after `####`, else the last of the text; None where there is none.

    Thousands separators, a currency sign and a full stop at the end are not part of its value.
    """
    marked = next(_numbers(text.partition(_MARK)[2]), None)
    if marked is not None:
        return marked
    last = deque(_numbers(text), maxlen=1)
    return last[0] if last else None


def _numbers(text: str) -> Iterator[Decimal]:
    """Yield the numbers in a text, in order."""
    for match in _NUMBER.finditer(text):
        value = Decimal(match["digits"].replace(",", ""))
        yield value.copy_negate() if set(match["sign"]) & {"-", "−"} else value


def final_number_match(prediction: str, reference: str, lang: str) -> float:
    """Return 1 where both texts end in the same number (GSM8K), else 0; 18 equals 18.00."""
    expected = final_number(reference)
    return float(expected is not None and final_number(prediction) == expected)
