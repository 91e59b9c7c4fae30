"""The rows of BLEU and chrF against those that sacrebleu counts, example by example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lorakit.scoring.metrics import compute_statistics
from lorakit.scoring.ngrams import characters, gram_counts

TOKENIZERS = {"en": "13a", "zh": "zh"}
TEXTS = st.one_of(
    st.text("ab .,7-我爱ａ", max_size=14),
    st.lists(st.sampled_from(["a", "b", "the", "12.5", "我", "<skipped>"]), max_size=12).map(
        " ".join
    ),
)
EXAMPLES = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1)


def sacrebleus_rows(
    metric: BLEU | CHRF, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[list[int]]:
    most = max(map(len, references))
    padded = [[*listed, *[None] * (most - len(listed))] for listed in references]
    rows: list[list[int]] = metric._extract_corpus_statistics(
        predictions, list(zip(*padded, strict=True))
    )
    return rows


@given(EXAMPLES, st.sampled_from(["en", "zh"]))
@settings(max_examples=150, deadline=None)
@example([("", [""])], "en")
@example([("a b c d e", ["", "a b c d"]), ("", ["a"]), ("  ", [" ", "", "x"])], "en")
@example([("我爱你 a", ["我爱他", "我爱你 a"])], "zh")
def test_rows_are_those_of_sacrebleu(examples: list[tuple[str, list[str]]], lang: str) -> None:
    predictions, references = zip(*examples, strict=True)
    bleu, chrf = BLEU(tokenize=TOKENIZERS[lang], force=True), CHRF()
    judges: dict[str, BLEU | CHRF] = {"bleu": bleu, "chrf": chrf}
    for name, judge in judges.items():
        expected = sacrebleus_rows(judge, predictions, references)
        statistics = compute_statistics(predictions, references, metric=name, lang=lang)
        assert statistics.rows == expected
        assert statistics.signature == str(judge.get_signature())


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_rows_do_not_depend_on_how_many_examples_are_counted_at_once(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(["a", "bb", "c"], size=n)) for n in draw.integers(0, 9, 40)]
    references = [texts[n - 5 : n] or ["a b"] for n in range(40)]
    whole = compute_statistics(texts, references, metric=metric).rows
    monkeypatch.setattr("lorakit.scoring.sacrebleu._EXAMPLES_AT_ONCE", 3)
    assert compute_statistics(texts, references, metric=metric).rows == whole


def test_a_character_may_be_any_code_point_or_half_of_one() -> None:
    assert characters("a我\U0001f600\ud800").tolist() == [0x61, 0x6211, 0x1F600, 0xD800]


def test_shared_grams_are_counted_on_every_side() -> None:
    sides = [["abab", "x"], ["abb", "y"]]
    orders = list(gram_counts([[characters(text) for text in side] for side in sides], 3))
    for order, (numbers, counts) in enumerate(orders, 1):
        for number in range(2):
            ours, theirs = (
                Counter(side[number][i : i + order] for i in range(len(side[number]) - order + 1))
                for side in sides
            )
            rows = counts[:, numbers == number].T.tolist()
            shared = sorted(row for row in rows if min(row))
            assert shared == sorted([ours[gram], theirs[gram]] for gram in ours & theirs)
