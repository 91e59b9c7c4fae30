"""Cautions: which metrics cannot work on these references, and what to use instead."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lorakit.scoring.answers import final_number
from lorakit.scoring.languages import LANGUAGES, script_of
from lorakit.scoring.metrics import METRICS
from lorakit.scoring.statistics import References

_ENOUGH_TO_JUDGE = 1000


def find_cautions(references: References, *, metrics: Sequence[str], lang: str) -> list[str]:
    """Return a line about each kind of metric that cannot work on such references."""
    texts = list(itertools.chain(*references[:_ENOUGH_TO_JUDGE]))
    script = script_of(texts)
    cautions = []
    by_word = _reading(metrics, "words", "ascii")
    if by_word and _needs_other_language(script, lang):
        cautions.append(
            f"the references are mostly {LANGUAGES[script].name}, whose words --lang {lang} does "
            f"not find ({', '.join(by_word)}); use --lang {script}"
        )
    by_ascii = _reading(metrics, "ascii")
    if by_ascii and script == "other" and LANGUAGES[lang].spaced:
        cautions.append(
            f"the references are mostly not in ASCII letters, the only ones {', '.join(by_ascii)} "
            "counts; use --metric chrf"
        )
    by_number = _reading(metrics, "numbers")
    if by_number and 2 * sum(final_number(text) is None for text in texts) > len(texts):
        cautions.append(
            f"most references hold no number, which {', '.join(by_number)} compares; "
            "choose another --metric"
        )
    return cautions


def _reading(metrics: Sequence[str], *kinds: str) -> list[str]:
    """Return those of the metrics that read one of these kinds of content."""
    return [name for name in metrics if METRICS[name].reads in kinds]


def _needs_other_language(script: str, lang: str) -> bool:
    """Return whether `lang` misses words: unspaced ones, or kana among Chinese characters."""
    if script not in LANGUAGES or script == lang:
        return False
    return LANGUAGES[lang].spaced or script == "ja"
