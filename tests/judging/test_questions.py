"""Judging: how answers are read, and what numbers they make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.judging.questions import (
    Item,
    choose_template,
    parse_choice,
    parse_rating,
    preference_items,
    preference_summary,
    rating_items,
    rating_summary,
)
from lorakit.prompts import PREFERENCE_PROMPTS, RATING_PROMPTS, fields_of
from lorakit.records.jsonl import load_records


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        *((str(n), n) for n in range(11)),
        (" 8\n", 8),
        ("8.", 8),
        ("**8**", 8),
        ('"8"', 8),
        *((text, None) for text in ("", "11", "-1", "8.5", "8/10", "Score: 8", "8 or 9", "08")),
        *((text, None) for text in ("eight", "１", "²", "55555555", "10 0")),
    ],
)
def test_a_rating_is_an_integer_from_0_to_10_and_nothing_else(
    answer: str, rating: int | None
) -> None:
    assert parse_rating(answer) == rating


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        *((text, "A") for text in ("A", " A.\n", "“A”", "**A**", '"A"')),
        ("B", "B"),
        *((text, None) for text in ("", "a", "C", "AB", "A or B", "Response A", "A is better")),
    ],
)
def test_a_choice_is_one_letter_and_nothing_else(answer: str, choice: str | None) -> None:
    assert parse_choice(answer) == choice


def judged(answers: Mapping[str, list[Any]]) -> tuple[list[Item], list[str], Any]:
    """Return items, judges and what they answer, given by judge and item (and order)."""
    count = len(next(iter(answers.values())))
    lengths = [1 if isinstance(one, str) else len(one) for one in next(iter(answers.values()))]
    items = [Item(str(n), tuple(f"{n}.{m}" for m in range(lengths[n]))) for n in range(count)]

    def answer(judge: str, prompt: str) -> str:
        n, m = map(int, prompt.split("."))
        return str(answers[judge][n][m] if lengths[n] > 1 else answers[judge][n])

    return items, list(answers), answer


def test_gpt_score_is_the_mean_over_judges_in_percent() -> None:
    summary, rows = rating_summary(*judged({"x": ["8", "10"], "y": ["5", "no"]}))
    assert summary["gpt_score"] == (90 + 50) / 2
    assert summary["judges"] == {
        "x": {"gpt_score": 90, "rated": 2, "malformed": 0},
        "y": {"gpt_score": 50, "rated": 1, "malformed": 1},
    }
    assert [row["ratings"] for row in rows] == [{"x": 8, "y": 5}, {"x": 10, "y": None}]
    assert rows[1]["answers"] == {"x": "10", "y": "no"}


def test_a_judge_without_a_rating_makes_no_score() -> None:
    summary, _ = rating_summary(*judged({"x": ["8"], "y": ["?"]}))
    assert summary["gpt_score"] is None
    assert summary["judges"]["y"] == {"gpt_score": None, "rated": 0, "malformed": 1}


def test_a_judge_that_looks_at_the_place_alone_makes_ties() -> None:
    summary, _ = preference_summary(*judged({"x": [("A", "A")] * 3 + [("B", "B")]}))
    assert summary["preference"] == 50
    told = summary["judges"]["x"]
    assert (told["wins"], told["ties"], told["losses"], told["first"]) == (0, 4, 0, 75)


def test_wins_and_losses_hold_in_both_orders() -> None:
    answers = [("B", "A"), ("B", "A"), ("A", "B"), ("A", "A"), ("B", "both"), ("", "")]
    summary, rows = preference_summary(*judged({"x": answers}))
    assert summary["judges"]["x"] == {
        "preference": 100 * 2.5 / 4,
        "wins": 2,
        "ties": 1,
        "losses": 1,
        "malformed": 2,
        "first": pytest.approx(100 * 5 / 9),
    }
    choices = [row["choices"]["x"] for row in rows]
    assert choices == ["win", "win", "loss", "tie", None, None]


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


ROW = {"id": "1", "prompt": "p", "completion": "c", "prediction": "ours"}


@pytest.mark.parametrize("name", RATING_PROMPTS)
def test_every_shipped_template_asks_for_what_a_record_has(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a", {**ROW, "references": ["r", "s"]})
    (item,) = rating_items(path, choose_template(name, preference=False)[1])
    assert all(line in item.prompts[0] for line in (": p\n", ": r\n", ": ours\n"))
    others, _ = load_records(write(tmp_path / "b", {**ROW, "prediction": "theirs"}))
    (pair,) = preference_items(path, others, choose_template(name, preference=True)[1])
    assert "A. theirs\nB. ours\n" in pair.prompts[0]
    assert "A. ours\nB. theirs\n" in pair.prompts[1]
    assert set(fields_of(PREFERENCE_PROMPTS[name])) == {"prompt", "a", "b"}


def test_a_template_of_ones_own_names_any_field(tmp_path: Path) -> None:
    name, text = choose_template("{{topic}}: {{prediction}}?", preference=False)
    assert name == "own"
    (item,) = rating_items(write(tmp_path / "a", {**ROW, "topic": "t"}), text)
    assert item == Item("1", ("t: ours?",))


@pytest.mark.parametrize(
    ("template", "preference", "missing"),
    [("{{prompt}}", False, "prediction"), ("{{a}} {{prediction}}", True, "b"), ("typo", True, "a")],
)
def test_a_template_without_what_is_judged_is_refused(
    template: str, preference: bool, missing: str
) -> None:
    with pytest.raises(LorakitError, match=f"lacks {{{{{missing}}}}}; .* general, dialogue-sum"):
        choose_template(template, preference=preference)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([], "a holds 1 records, --against 0; "),
        ([{**ROW, "id": "2"}], r"a:1: its id is not that of .*b:1; "),
        ([{**ROW, "prompt": "q"}], r"a:1: its prompt is not that of .*b:1; "),
    ],
)
def test_two_files_of_other_records_are_refused(
    other: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    others = load_records(write(tmp_path / "b", *other))[0] if other else []
    with pytest.raises(LorakitError, match=message):
        preference_items(write(tmp_path / "a", ROW), others, "{{a}}{{b}}")


def test_a_record_without_a_reference_is_refused_by_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"prompt": "p", "prediction": "x"})
    with pytest.raises(LorakitError, match=r"a:1: no field 'reference'; "):
        rating_items(path, RATING_PROMPTS["general"])
