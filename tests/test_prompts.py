"""Prompts: the templates that make a prompt of a row."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.prompts import PROMPTS, fields_of, fill
from lorakit.recipes.table import RECIPES

ROW: dict[str, Any] = {
    "text": "A {{title}} & \\1 \\g<0>",
    "title": "T",
    "two words": "both",
    "題": "見出し",
    "number": 3,
    "share": 0.5,
    "flag": True,
    "none": None,
    "list": ["x"],
}


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{{title}}", "T"),
        ("a {{ title }} b", "a T b"),
        ("{{title}}{{title}}", "TT"),
        ("{{two words}}", "both"),
        ("{{題}}：", "見出し："),
        ("{{number}} {{share}}", "3 0.5"),
        ("no field", "no field"),
        ("", ""),
        ("{title} {{}} }}{{", "{title} {{}} }}{{"),
        ("{{{title}}}", "{T}"),
        ("{{text}}", "A {{title}} & \\1 \\g<0>"),
        ("line\n{{title}}\n", "line\nT\n"),
    ],
)
def test_a_template_is_filled_once_and_the_rest_stays_as_written(
    template: str, filled: str
) -> None:
    assert fill(template, ROW, "x:1") == filled


@pytest.mark.parametrize("name", ["flag", "none", "list"])
def test_a_field_that_is_neither_text_nor_number_is_refused(name: str) -> None:
    with pytest.raises(LorakitError, match=rf"^x:1: field '{name}' is not a text; "):
        fill(f"{{{{{name}}}}}", ROW, "x:1")


def test_a_missing_field_is_named_with_those_there_are() -> None:
    with pytest.raises(LorakitError, match=r"^x:1: no field 'Title'; .*: a, b$"):
        fill("{{Title}}", {"a": "1", "b": "2"}, "x:1")
    with pytest.raises(LorakitError, match=r"no field 'a'; .*: none$"):
        fill("{{a}}", {}, "x:1")


def test_the_fields_of_a_template_are_listed_in_their_order() -> None:
    assert fields_of("{{b}} {{ a b }} {c} {{b}}") == ["b", "a b", "b"]


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_of_the_papers_asks_for_fields_and_ends_where_the_answer_begins(name: str) -> None:
    assert fields_of(PROMPTS[name])
    assert re.search(r":$", PROMPTS[name])
    assert name in RECIPES
    assert RECIPES[name].completion.startswith(" "), "the space belongs to the completion"
