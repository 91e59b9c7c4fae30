"""Metrics against their oracles: rouge_score, sacrebleu's own command, real labels."""

from __future__ import annotations

import gzip
import json
import math
import random
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import LorakitError
from lorakit.scoring.answers import (
    contains_label,
    exact_match,
    final_number,
    final_number_match,
    first_words_match,
    token_f1,
)
from lorakit.scoring.languages import LANGUAGES, normalise, script_of, words
from lorakit.scoring.metrics import METRICS, compute_statistics, score

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ROUGE = [name for name in METRICS if name.startswith("rouge")]
TEXT_METRICS = [name for name, metric in METRICS.items() if metric.decides]
SACREBLEU = ["bleu", "chrf"]
LABEL_METRICS = ["em", "f1", "contains", "accuracy"]


def data_file(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs the real data set {name} beside the repository")
    return path


def scitldr_pairs(limit: int | None = None) -> tuple[list[str], list[list[str]]]:
    """The first sentence of each abstract as the prediction, and its 2 to 4 human TLDRs."""
    lines = data_file("scitldr/test.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    records = [json.loads(line) for line in lines]
    return [record["source"][0] for record in records], [record["target"] for record in records]


def japanese_headlines(limit: int) -> list[str]:
    """Headlines of Wikinews with their own word segmentation (single spaces)."""
    with gzip.open(data_file("jawikinews/full-articles.tsv.gz"), "rt", encoding="utf-8") as stream:
        next(stream)
        return [next(stream).rstrip("\n").split("\t")[2].strip() for _ in range(limit)]


# — ROUGE —


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_mean_of_rouge_scores_maximum_over_the_references(kind: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    predictions, references = scitldr_pairs()
    scorer = RougeScorer([kind])
    best = [
        max(scorer.score(reference, prediction)[kind].fmeasure for reference in listed)
        for prediction, listed in zip(predictions, references, strict=True)
    ]
    scored = score(predictions, references, metric=kind)
    assert scored.count == len(best) > 600
    assert scored.value == 100 * math.fsum(best) / len(best)
    assert "nrefs:var|refs:max" in scored.signature
    assert "stemmer:no" in scored.signature


WORDS = st.lists(st.sampled_from("abcdef"), max_size=40)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_rouge_l_is_to_the_bit_rouge_scores_own(ours: list[str], listed: list[list[str]]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    text, references = " ".join(ours), [" ".join(words) for words in listed]
    expected = RougeScorer(["rougeL"]).score_multi(references, text)["rougeL"].fmeasure
    assert compute_statistics([text], [references], metric="rougeL").rows == [[expected]]


def test_rouge_lsum_takes_lines_for_sentences() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    prediction, reference = "a dog ran\nthe cat sat", "the cat sat\na dog ran"
    expected = RougeScorer(["rougeLsum"]).score(reference, prediction)["rougeLsum"].fmeasure
    assert score([prediction], [[reference]], metric="rougeLsum").value == 100 * expected == 100
    assert score([prediction], [[reference]], metric="rougeL").value < 100
    assert "sentences:lines" in score(["a"], [["a"]], metric="rougeLsum").signature


@pytest.mark.parametrize("kind", ROUGE)
def test_japanese_rouge_is_rouge_of_mecabs_words(kind: str) -> None:
    """rouge_score's default tokenizer on words renamed to ASCII is the oracle."""
    from rouge_score.rouge_scorer import RougeScorer

    predictions = ["猫が椅子に座った。", "国境の長いトンネルを抜けると雪国であった"]
    references = ["犬が椅子に座る。", "長いトンネルを抜けたら、そこは雪国だった"]
    names: dict[str, str] = {}

    def rename(text: str) -> str:
        return " ".join(names.setdefault(word, f"w{len(names)}") for word in words(text, lang="ja"))

    scorer = RougeScorer([kind])
    pairs = zip(predictions, references, strict=True)
    expected = [scorer.score(rename(r), rename(p))[kind].fmeasure for p, r in pairs]
    scored = score(predictions, [[r] for r in references], metric=kind, lang="ja")
    assert scored.value == pytest.approx(50 * sum(expected), abs=1e-9)
    assert 0 < scored.value < 100


def test_identical_japanese_texts_score_100_where_the_default_tokenizer_scores_0() -> None:
    text = "国境の長いトンネルを抜けると雪国であった。"
    assert score([text], [[text]], metric="rougeL", lang="ja").value == 100
    assert score([text], [[text]], metric="rougeL", lang="en").value == 0
    signature = score([text], [[text]], metric="rougeL", lang="ja").signature
    assert "tok:fugashi-" in signature
    assert "+unidic-lite-" in signature


def test_chinese_rouge_goes_by_character_and_latin_word() -> None:
    assert words("我在New York吃apple。", lang="zh") == [
        *"我在",
        "New",
        "York",
        "吃",
        "apple",
        "。",
    ]
    assert score(["我爱你"], [["我爱他"]], metric="rouge1", lang="zh").value == pytest.approx(
        200 / 3
    )


# — BLEU and chrF —


def run_sacrebleu(reference: Path, prediction: Path, *options: str) -> dict[str, str | float]:
    command = [sys.executable, "-m", "sacrebleu", str(reference), "-i", str(prediction), "-w", "10"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    answer: dict[str, str | float] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("system", ["NLLB_Greedy", "ONLINE-A"])
@pytest.mark.parametrize(
    ("metric", "options"),
    [("bleu", ("-m", "bleu", "--tokenize", "zh")), ("chrf", ("-m", "chrf"))],
    ids=["bleu", "chrf"],
)
def test_a_chinese_system_scores_what_sacrebleus_own_command_says(
    system: str, metric: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    size = 500
    folder = data_file("wmt23-en-zh")
    files = []
    for name in ("ref.refA", f"hyp.{system}"):
        text = (folder / f"generaltest2023.en-zh.{name}.zh").read_text(encoding="utf-8")
        files.append(tmp_path / name)
        files[-1].write_text("\n".join(text.split("\n")[:size]) + "\n", encoding="utf-8")
    references, predictions = (path.read_text(encoding="utf-8").split("\n")[:-1] for path in files)
    theirs = run_sacrebleu(files[0], files[1], *options)
    ours = score(predictions, [[reference] for reference in references], metric=metric, lang="zh")
    assert ours.count == size
    assert float(f"{ours.value:.10f}") == theirs["score"]
    assert ours.signature == theirs["signature"]


@pytest.mark.parametrize("metric", SACREBLEU)
def test_a_varying_number_of_references_is_what_sacrebleus_api_makes_of_none(metric: str) -> None:
    from sacrebleu import BLEU, CHRF

    predictions, references = scitldr_pairs(200)
    streams = [[listed[n] if n < len(listed) else None for listed in references] for n in range(5)]
    judge: BLEU | CHRF = BLEU() if metric == "bleu" else CHRF()
    theirs = judge.corpus_score(predictions, streams)  # type: ignore[arg-type]
    ours = score(predictions, references, metric=metric)
    assert ours.value == theirs.score
    assert ours.signature == str(judge.get_signature())
    assert ours.signature.startswith("nrefs:var|")


@pytest.mark.parametrize("metric", SACREBLEU)
def test_examples_with_few_references_are_not_changed_by_those_with_more(metric: str) -> None:
    """The padding adds no empty reference: each row is the row of the example alone."""
    predictions, references = scitldr_pairs(60)
    together = compute_statistics(predictions, references, metric=metric).rows
    alone = [
        compute_statistics([text], [listed], metric=metric).rows[0]
        for text, listed in zip(predictions, references, strict=True)
    ]
    assert [list(row) for row in together] == [list(row) for row in alone]


def test_japanese_bleu_is_bleu_of_mecabs_words_and_says_so() -> None:
    from sacrebleu import BLEU

    references = [text.replace(" ", "") for text in japanese_headlines(100)]
    predictions = [text[: max(6, len(text) * 3 // 4)] for text in references]
    segmented = [[" ".join(words(t, lang="ja")) for t in ts] for ts in (predictions, references)]
    expected = BLEU(tokenize="none").corpus_score(segmented[0], [segmented[1]]).score
    scored = score(predictions, [[reference] for reference in references], metric="bleu", lang="ja")
    assert scored.value == expected > 20
    assert "tok:none" in scored.signature
    assert scored.signature.split("|")[-1].startswith("segmenter:fugashi-")


# — answers: SQuAD, HotpotQA, labels —


@pytest.mark.parametrize(
    ("prediction", "reference", "em", "f1", "contains", "accuracy"),
    [
        pytest.param("The Beatles", "beatles!", 1, 1, 1, 0, id="case, articles, punctuation"),
        pytest.param("It was the Beatles.", "The Beatles", 0, 0.5, 1, 0, id="longer output"),
        pytest.param("in 1969", "1969 or 1970", 0, 0.4, 0, 0, id="partial overlap"),
        pytest.param("cat cat cat", "cat", 0, 0.5, 1, 1, id="repeats count once"),
        pytest.param("Norway", "Nor", 0, 0, 0, 0, id="contained only inside a word"),
        pytest.param("well-known", "wellknown", 1, 1, 1, 1, id="punctuation is deleted"),
        pytest.param("anthem, theory", "them", 0, 0, 0, 0, id="articles only as words"),
        pytest.param("Yes, it is", "yes", 0, 0, 1, 1, id="went on after yes"),
        pytest.param("yes", "no", 0, 0, 0, 0, id="yes is not no"),
        pytest.param("no", "no one knows", 0, 0, 0, 0, id="no against a sentence"),
        pytest.param("noanswer", "noanswer", 1, 1, 1, 1, id="no answer agreed"),
        pytest.param("no way", "no chance", 0, 0.5, 0, 0, id="no inside both answers"),
        pytest.param("- **Yes**\nNo", "Yes", 0, 0, 1, 1, id="marks before the word"),
        pytest.param("not entailment, as", "not entailment", 0, 0.8, 1, 1, id="two-word label"),
        pytest.param("A", "A", 1, 1, 1, 1, id="a label that is an article"),
        pytest.param("(A) the first", "A", 0, 0.5, 1, 1, id="an article label goes on"),
        pytest.param("A B", "B", 1, 1, 1, 0, id="the first word is A"),
        pytest.param("+", "+", 1, 1, 1, 1, id="a label of punctuation"),
        pytest.param("the", "a", 0, 0, 0, 0, id="two different articles"),
        pytest.param("", "yes", 0, 0, 0, 0, id="empty prediction"),
        pytest.param("", "", 0, 0, 0, 0, id="both empty"),
        pytest.param("anything", " ", 0, 0, 0, 0, id="empty label"),
    ],
)
def test_answers_are_compared_as_squad_and_hotpotqa_do(
    prediction: str, reference: str, em: float, f1: float, contains: float, accuracy: float
) -> None:
    assert exact_match(prediction, reference, "en") == em
    assert token_f1(prediction, reference, "en") == pytest.approx(f1)
    assert contains_label(prediction, reference, "en") == contains
    assert first_words_match(prediction, reference, "en") == accuracy


@pytest.mark.parametrize(
    ("lang", "prediction", "reference", "em", "f1", "contains", "accuracy"),
    [
        pytest.param("ja", "「東京」", "東京", 1, 1, 1, 1, id="Japanese brackets"),
        pytest.param("ja", "はい、そうです。", "はい", 0, 0.5, 1, 1, id="Japanese yes goes on"),
        pytest.param("ja", "１９６９年", "1969年", 1, 1, 1, 1, id="full-width digits"),
        pytest.param("ja", "ジョン・スミス", "ジョンスミス", 1, 0, 1, 0, id="middle dot"),
        pytest.param("ja", "答えは東京です", "東京", 0, 0.4, 1, 0, id="Japanese substring"),
        pytest.param("ja", "", "東京", 0, 0, 0, 0, id="Japanese empty"),
        pytest.param("zh", "是的，因为", "是", 0, 0.4, 1, 1, id="Chinese first character"),
        pytest.param("zh", "北京。", "北京", 1, 1, 1, 1, id="Chinese full stop"),
        pytest.param("zh", "在北京市", "北京", 0, 2 / 3, 1, 0, id="Chinese by character"),
        pytest.param("zh", "The A", "A", 0, 2 / 3, 1, 0, id="articles stay"),
    ],
)
def test_answers_without_spaces_are_compared_by_segmented_words(
    lang: str,
    prediction: str,
    reference: str,
    em: float,
    f1: float,
    contains: float,
    accuracy: float,
) -> None:
    assert exact_match(prediction, reference, lang) == em
    assert token_f1(prediction, reference, lang) == pytest.approx(f1)
    assert contains_label(prediction, reference, lang) == contains
    assert first_words_match(prediction, reference, lang) == accuracy


def test_real_hotpotqa_labels_score_themselves_and_their_sentences() -> None:
    path = data_file("hotpotqa/hotpot_dev_distractor_subset479.json")
    labels = [record["answer"] for record in json.loads(path.read_text(encoding="utf-8"))]
    references = [[label] for label in labels]
    for metric in LABEL_METRICS:
        assert score(labels, references, metric=metric).value == 100
    longer = [f"I believe the answer is {label}." for label in labels]
    assert score(longer, references, metric="contains").value == 100
    assert score(longer, references, metric="em").value == 0
    assert 0 < score(longer, references, metric="f1").value < 100


def test_real_japanese_answers_score_themselves() -> None:
    answers = json.loads(data_file("jemhopqa/dev.json").read_text(encoding="utf-8"))
    labels = [answer["answer"] for answer in answers]
    for metric in LABEL_METRICS:
        assert score(labels, [[label] for label in labels], metric=metric, lang="ja").value == 100


# — GSM8K —


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes <<9*2=18>>18 dollars.\n#### 18", "18"),
        ("#### 1,080", "1080"),
        ("#### $1,080.50.", "1080.5"),
        ("#### 7 apples, not 9", "7"),
        ("#### 72\n\nQuestion: 5 cats?\n#### 5", "72"),
        ("So the answer is 72.\n####", "72"),
        ("The answer is 18.0.", "18"),
        ("from 3 to 4, then $-5", "-5"),
        ("a loss of -$5.00", "-5"),
        ("it fell to −12 degrees", "-12"),
        ("20-5", "5"),
        ("(3)-2", "2"),
        ("**-2**", "-2"),
        ("1,2,3", "3"),
        ("1,000,000 people", "1000000"),
        ("1,0000", "0"),
        ("50%", "50"),
        ("costs $.50", "0.5"),
        ("答えは１２です", "12"),
        ("12345678901234567890123456789012345", "12345678901234567890123456789012345"),
        ("-12345678901234567890123456789012345", "-12345678901234567890123456789012345"),
        ("no number", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_final_number_is_read_as_a_person_would(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_a_prediction_without_a_number_never_matches() -> None:
    assert final_number_match("", "", "en") == final_number_match("none", "#### 3", "en") == 0


def test_every_gsm8k_reference_scores_100_against_itself_and_against_its_number() -> None:
    lines = data_file("gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    references = [[answer] for answer in answers]
    numbers = [answer.split("####")[1].strip() for answer in answers]
    for written in (answers, numbers, [f"The answer is ${number}.00." for number in numbers]):
        assert score(written, references, metric="gsm8k").value == 100
    wrong = [f"#### {final_number(answer) + 1}" for answer in answers]  # type: ignore[operator]
    assert score(wrong, references, metric="gsm8k").value == 0


# — all metrics —

TEXTS = {
    "en": st.lists(
        st.sampled_from(["the", "cat", "dog", "sat", "7", "B", "42,000", "ran!", "é", "#### 3"]),
        max_size=12,
    ).map(" ".join),
    "ja": st.text(alphabet="東京都猫犬がはをいたの。、7A ", max_size=12),
    "zh": st.text(alphabet="北京猫狗是的在了。，7A ", max_size=12),
}
EXAMPLES = st.sampled_from(sorted(TEXTS)).flatmap(
    lambda lang: st.tuples(
        st.just(lang),
        st.lists(
            st.tuples(TEXTS[lang], st.lists(TEXTS[lang], min_size=1, max_size=3)),
            min_size=1,
            max_size=4,
        ),
    )
)


@pytest.mark.parametrize("metric", TEXT_METRICS)
@settings(max_examples=25, deadline=None)
@given(drawn=EXAMPLES, seed=st.randoms(use_true_random=False))
def test_scores_stay_within_bounds_whatever_the_order_of_references_and_examples(
    metric: str, drawn: tuple[str, list[tuple[str, list[str]]]], seed: random.Random
) -> None:
    """But for chrF's references, of which sacrebleu takes the first among equals."""
    lang, examples = drawn
    value = score(*split(examples), metric=metric, lang=lang).value
    assert 0 <= value <= 100 + 1e-9
    shuffled = seed.sample(examples, len(examples))
    if metric != "chrf":
        shuffled = [(text, seed.sample(listed, len(listed))) for text, listed in shuffled]
    assert score(*split(shuffled), metric=metric, lang=lang).value == value


def split(examples: list[tuple[str, list[str]]]) -> tuple[list[str], list[list[str]]]:
    return [text for text, _ in examples], [listed for _, listed in examples]


@pytest.mark.parametrize("metric", TEXT_METRICS)
@pytest.mark.parametrize(
    ("lang", "text"),
    [
        ("en", "the answer is that 42 cats sat on a mat"),
        ("ja", "答えは四十二匹、つまり42匹の猫である。"),
        ("zh", "答案是四十二只猫，也就是42只猫。"),
    ],
    ids=LANGUAGES,
)
def test_a_prediction_equal_to_one_of_its_references_scores_100(
    metric: str, lang: str, text: str
) -> None:
    references = [["something else, 7", text], [text]]
    assert score([text, text], references, metric=metric, lang=lang).value == pytest.approx(100)


@pytest.mark.parametrize("metric", TEXT_METRICS)
@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize("text", ["", " ", "\n", "　", "\0", "\ud83d", "。", "…", "🙂", "\u200b"])
def test_empty_and_odd_predictions_score_0_and_never_crash(
    metric: str, lang: str, text: str
) -> None:
    assert score([text], [["the answer is 42"]], metric=metric, lang=lang).value == 0
    assert score(["the answer is 42"], [[text]], metric=metric, lang=lang).value == 0


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_rows_of_drawn_examples_add_up_to_their_score(metric: str) -> None:
    """What a significance test relies on: a resample needs only the sum of its rows."""
    predictions, references = scitldr_pairs(30)
    statistics = compute_statistics(predictions, references, metric=metric)
    chosen = random.Random(0).choices(range(30), k=30)
    total = [
        math.fsum(statistics.rows[i][k] for i in chosen) for k in range(len(statistics.rows[0]))
    ]
    drawn = score([predictions[i] for i in chosen], [references[i] for i in chosen], metric=metric)
    assert statistics.value_of(total, 30) == drawn.value


@pytest.mark.parametrize("metric", TEXT_METRICS)
@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_score_carries_a_version_and_its_number_of_references(metric: str, lang: str) -> None:
    scored = score(["a 1"], [["a 1", "b 2"]], metric=metric, lang=lang)
    assert scored.name == metric
    assert scored.signature.startswith("nrefs:2|")
    assert "|version:" in scored.signature
    assert " " not in scored.signature
    assert (
        metric == "chrf"
        or lang == "en"
        or scored.signature != score(["a 1"], [["a 1", "b 2"]], metric=metric).signature
    )


@pytest.mark.parametrize(
    ("predictions", "references", "metric", "lang", "message"),
    [
        (["a"], [["a"]], "rouge9", "en", "unknown metric 'rouge9'; choose from rouge1, "),
        (["a"], [["a"]], "em", "fr", "unknown language 'fr'; choose from en, ja, zh"),
        ([], [], "em", "en", "0 predictions"),
        (["a"], [[]], "em", "en", "one or more references"),
        (["a"], [["a"], ["b"]], "em", "en", "2 lists of references"),
    ],
    ids=["metric", "language", "nothing", "no reference", "lengths"],
)
def test_what_cannot_be_scored_is_an_error_that_says_what_to_give(
    predictions: list[str], references: list[list[str]], metric: str, lang: str, message: str
) -> None:
    with pytest.raises(LorakitError, match=message):
        score(predictions, references, metric=metric, lang=lang)


# — words —


def test_mecabs_words_mostly_agree_with_a_corpus_segmented_by_others() -> None:
    """Word ends in common with Wikinews' own segmentation: an indication, not an identity."""
    shared = total = 0
    for headline in japanese_headlines(300):
        their_ends = ends_of(headline.split())
        our_ends = ends_of(words(headline.replace(" ", ""), lang="ja"))
        shared += 2 * len(their_ends & our_ends)
        total += len(their_ends) + len(our_ends)
    assert shared / total > 0.9


def ends_of(cut: list[str]) -> set[int]:
    return {sum(map(len, cut[: n + 1])) for n in range(len(cut))}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_words_hold_every_character_that_is_not_white_space(lang: str) -> None:
    text = "猫が a-b 座った。\n３匹 (cats)　是的 "
    assert "".join(words(text, lang=lang)) == "".join(text.split())


def test_normalising_twice_changes_nothing() -> None:
    for lang in LANGUAGES:
        once = normalise("The ＡＢＣ, 「東京」 a-b!", lang=lang)
        assert normalise(once, lang=lang) == once


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("An English text with 東京", "ascii"),
        ("猫が座った。", "ja"),
        ("ﾈｺ ガ", "ja"),
        ("我爱北京", "zh"),
        ("Привет, мир", "other"),
        ("안녕하세요", "other"),
        ("1234 !?", "ascii"),
        ("", "ascii"),
    ],
)
def test_the_script_of_a_text_is_that_of_most_of_its_letters(text: str, script: str) -> None:
    assert script_of([text]) == script


# — how long outputs are —


@pytest.mark.parametrize(
    ("lang", "text", "count"),
    [
        ("en", "It is so, I think.", 5),
        ("ja", "猫が椅子に座った。", 7),
        ("zh", "我吃apple。", 4),
        ("en", " ", 0),
    ],
)
def test_length_is_the_mean_number_of_words_of_the_outputs(
    lang: str, text: str, count: int
) -> None:
    scored = score([text, ""], [["a"], ["a"]], metric="length", lang=lang)
    assert scored.value == count / 2
    assert scored.signature.startswith("tok:")


@pytest.mark.parametrize(
    ("prediction", "labels", "beyond"),
    [
        pytest.param("Yes", ["Yes", "No"], False, id="the label alone"),
        pytest.param(' "yes." ', ["Yes", "No"], False, id="punctuation is no word"),
        pytest.param("Yes, it fits.", ["Yes", "No"], True, id="words after the label"),
        pytest.param("No, it does not.", ["Yes", "No"], True, id="after a wrong label, too"),
        pytest.param("Yesterday it did", ["Yes", "No"], False, id="another word"),
        pytest.param("It fits: yes", ["Yes", "No"], False, id="the label later on"),
        pytest.param("Not at all", ["yes", "not at all"], False, id="a label of three words"),
        pytest.param("Not at all, no", ["yes", "not at all"], True, id="and a word after it"),
        pytest.param("New York", ["New", "New York"], False, id="a longer label as a whole"),
        pytest.param("A", ["A", "B"], False, id="a label that is an article"),
        pytest.param("A because", ["A", "B"], True, id="a word after that"),
        pytest.param("+", ["+", "-"], False, id="a label of punctuation"),
        pytest.param("+ because", ["+", "-"], True, id="a word after it all"),
        pytest.param("", ["Yes"], False, id="nothing"),
        pytest.param("Yes, so", ["…", " "], False, id="labels without words"),
    ],
)
def test_an_output_goes_on_after_a_label_if_words_follow_it(
    prediction: str, labels: list[str], beyond: bool
) -> None:
    scored = score([prediction, "zzz"], [["zzz"], labels], metric="words-beyond-label")
    assert scored.value == (50 if beyond else 0)


@pytest.mark.parametrize(
    ("lang", "alone", "followed"),
    [("ja", "はい。", "はい、そう思います。"), ("zh", "是。", "是，因为合适。")],
)
def test_words_follow_a_label_in_languages_without_spaces(
    lang: str, alone: str, followed: str
) -> None:
    labels = [["はい", "是"]] * 2
    scored = score([alone, followed], labels, metric="words-beyond-label", lang=lang)
    assert scored.value == 50


@pytest.mark.parametrize("name", ["length", "words-beyond-label"])
def test_a_metric_that_makes_no_output_better_decides_nothing(name: str) -> None:
    assert METRICS["rougeL"].decides
    assert not METRICS[name].decides


def test_the_overlap_with_the_baseline_where_both_are_correct_is_of_outputs_with_a_lower_f1() -> (
    None
):
    """Of five outputs three have a lower F1; in two of these both are correct; one contains."""
    rows = [
        ("b", "b", "it is b"),
        ("c", "c, say", "so c it is"),
        ("d", "d", "wrong"),
        ("e", "wrong", "e"),
        ("f", "f", "f"),
    ]
    labels, theirs, ours = zip(*rows, strict=True)
    statistics = compute_statistics(
        ours,
        [[label] for label in labels],
        metric="contains-baseline-both-correct",
        baseline_predictions=theirs,
    )
    assert statistics.rows == [[1, 1], [0, 1], [0, 0], [0, 0], [0, 0]]
    assert statistics.value == 50
    assert statistics.signature.endswith("|where:f1-below-baseline+both-contain-label")
