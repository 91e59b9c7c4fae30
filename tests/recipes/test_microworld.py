"""The microworld's records are the same everywhere, and its tiny model can do what they ask."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import LorakitError
from lorakit.recipes.microworld.documents import CONTRASTS, DOMAINS
from lorakit.recipes.microworld.words import LANGS, Dice
from lorakit.recipes.microworld.world import SIZES, TASKS, microworld

TINY = Path(lorakit.__file__).parent / "tiny"
CASES = [(task, lang) for task in TASKS for lang in LANGS if (task, lang) != ("translate", "ja")]
SUMMARIES = [case for case in CASES if TASKS[case[0]].kind in ("related", "target")]
WHOLE = [("echo", "en"), ("headline", "ja"), ("title", "en"), ("count", "ja"), ("yesno", "ja")]
PINNED: dict[str, str] = {
    "echo": "eb8447d0894eb71c",
    "first": "68d9adf488fd2fa6",
    "last": "77d3f9fed6456c7f",
    "mention": "74ca242fa36ef3be",
    "after": "0291c898c87256c8",
    "blank": "a96c6b9d7462dc33",
    "order": "75d377cc1ea7dd54",
    "continue": "f56e701d0e0b75d8",
    "headline": "97612cfdca6e495d",
    "howto": "87cccdca54038f80",
    "impression": "68400aa5417f1746",
    "title": "2c3996f4c7888950",
    "highlights": "81bf1f614cd8f735",
    "qa": "45c8a85bb9aced4e",
    "count": "a6c20376a785ca64",
    "translate": "f244e2defa31e44e",
    "summary": "0b3fda464c25aed5",
    "yesno": "64f405648fd35b34",
}
HOSTILE = [
    "",
    " ",
    "  two  spaces\n\n\ttab and end ",
    "na\u00efve \u00df \u0130 \u01c5",
    "e\u0301 and \u00e9",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u9f98\u9f98\U00020bb7\u91ce\u5bb6 \uff76\uff85 \u30f4\u30a1",
    "\x00\x01\x7f\ufeff\ufffd",
    "<0x0A> <0xE3> \u2581under \u2581\u2581",
    "a\r\nb\rc\u2028d",
    "1234567890 3.14 -5 #### 42",
]


def some(task: str, lang: str, split: str, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(microworld(task, lang=lang, split=split), count))


@pytest.mark.parametrize("task", TASKS)
def test_a_draw_is_the_same_on_every_machine(task: str) -> None:
    langs = [lang for lang in LANGS if (task, lang) in CASES]
    drawn = [some(task, lang, split, 5) for lang in langs for split in SIZES]
    text = json.dumps(drawn, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == PINNED[task]


@pytest.mark.parametrize(("task", "lang"), WHOLE)
def test_every_split_has_its_size_and_ids_are_unique(task: str, lang: str) -> None:
    ids = [record["id"] for split in SIZES for record in microworld(task, lang=lang, split=split)]
    assert len(ids) == len(set(ids)) == sum(SIZES.values())


@pytest.mark.parametrize(("task", "lang"), WHOLE)
def test_splits_share_no_prompt_whatever_the_seed(task: str, lang: str) -> None:
    train = {
        record["prompt"] for seed in (0, 1) for record in microworld(task, lang=lang, seed=seed)
    }
    held = {r["prompt"] for r in microworld(task, lang=lang, split="validation")}
    test = {r["prompt"] for r in microworld(task, lang=lang, split="test")}
    assert not train & held
    assert not train & test
    assert not held & test


def test_an_id_names_its_draw() -> None:
    record = some("headline", "ja", "test", 3)[2]
    assert record["id"] == "headline-ja-test-0-000002"
    assert (record["task"], record["lang"]) == ("headline", "ja")


def test_another_seed_gives_other_records() -> None:
    assert [r["prompt"] for r in microworld("title", seed=1)] != [
        r["prompt"] for r in microworld("title", seed=2)
    ]


@pytest.mark.parametrize(("task", "lang"), CASES)
def test_prompt_and_completion_join_as_written(task: str, lang: str) -> None:
    for record in some(task, lang, "train", 50):
        assert not record["prompt"].endswith(" ")
        if lang == "en":
            assert record["completion"].startswith(" ")
        assert record["completion"].strip()
        assert "\n" not in record["completion"]


@pytest.mark.parametrize(("task", "lang"), SUMMARIES)
def test_the_facts_of_a_summary_stand_in_its_prompt(task: str, lang: str) -> None:
    for record in some(task, lang, "train", 100):
        if lang == "en":
            names = re.findall(r"\b[A-Z][a-z]+", record["completion"].replace("On ", ""))
            assert all(name in record["prompt"] for name in names if name != "Likely")
        else:
            names = re.findall("[ァ-ヶー]+", record["completion"])
            assert all(name in record["prompt"] for name in names)


@pytest.mark.parametrize(("domain", "lang"), list(itertools.product(DOMAINS, LANGS)))
def test_documents_are_short_and_hold_every_fact(domain: str, lang: str) -> None:
    for index in range(200):
        document = DOMAINS[domain](Dice(f"{domain} {index}"), lang)
        text = document.text(lang)
        assert 3 <= len(document.sentences) <= 5
        facts = [fact.split(" ")[-1].split("を")[0] for fact in document.facts.values()]
        assert all(fact in text for fact in facts)
        if lang == "en":
            assert 15 <= len(text.split()) <= 70


@pytest.mark.parametrize("lang", LANGS)
def test_contrasts_put_the_true_word_first_about_as_often_as_last(lang: str) -> None:
    first = [c.index("{yes}") < c.index("{no}") for c in CONTRASTS[lang]]
    assert sum(first) == len(first) / 2


@pytest.mark.parametrize("lang", LANGS)
def test_a_question_says_its_type_and_has_its_answer_in_the_prompt(lang: str) -> None:
    drawn = some("qa", lang, "test", 100)
    assert {record["type"] for record in drawn} == {"bridge", "comparison"}
    assert all(record["completion"].strip() in record["prompt"] for record in drawn)


@pytest.mark.parametrize("lang", LANGS)
def test_a_word_problem_ends_with_the_number_that_its_steps_give(lang: str) -> None:
    for record in some("count", lang, "test", 100):
        have, get, total, _, give, left, answer = map(int, re.findall(r"\d+", record["completion"]))
        assert (have + get, total - give, left) == (total, left, answer)
        assert record["completion"].endswith(f"#### {answer}")


@pytest.mark.parametrize(("lang", "labels"), [("en", {" Yes", " No"}), ("ja", {"はい", "いいえ"})])
def test_response_selection_has_two_labels_about_as_often(lang: str, labels: set[str]) -> None:
    drawn = [record["completion"] for record in some("yesno", lang, "train", 400)]
    assert set(drawn) == labels
    assert 0.4 < sum(label == drawn[0] for label in drawn) / len(drawn) < 0.6


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        ({"task": "nonsense"}, "headline"),
        ({"task": "qa", "lang": "fr"}, "en, ja"),
        ({"task": "qa", "split": "dev"}, "train, validation, test"),
        ({"task": "translate", "lang": "ja"}, "en"),
    ],
    ids=["task", "lang", "split", "translate"],
)
def test_unknown_choices_are_one_line_that_lists_what_there_is(
    arguments: dict[str, Any], listed: str
) -> None:
    with pytest.raises(LorakitError) as error:
        microworld(**arguments)
    assert f"; choose one of {listed}" in str(error.value) or listed in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_any_text_is_decoded_back_unchanged(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(("task", "lang"), CASES)
def test_no_token_reaches_over_the_border_of_prompt_and_completion(
    tokenizer: Any, task: str, lang: str
) -> None:
    for record in some(task, lang, "train", 30):
        prompt, whole = record["prompt"], record["prompt"] + record["completion"]
        alone, joined = tokenizer(prompt), tokenizer(whole, return_offsets_mapping=True)
        count = len(alone["input_ids"])
        assert joined["input_ids"][:count] == alone["input_ids"]
        starts = [start for start, _ in joined["offset_mapping"][count:]]
        assert starts[0] == len(prompt)
        assert min(starts) >= len(prompt)


def test_tiny_is_small_and_says_what_it_is() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8_000_000
    card = (TINY / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "examples/make_tiny.py" in card


@pytest.mark.parametrize("lang", LANGS)
def test_tiny_copies_the_first_and_the_last_sentence(tokenizer: Any, lang: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(TINY)
    drawn = some("first", lang, "test", 20) + some("last", lang, "test", 20)
    inputs = tokenizer([r["prompt"] for r in drawn], padding=True, return_tensors="pt")
    ids = inputs["input_ids"]
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=inputs["attention_mask"], max_new_tokens=50
        )
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    right = sum(text == r["completion"] for text, r in zip(texts, drawn, strict=True))
    assert right >= 30
