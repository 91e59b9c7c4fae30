"""Prompts: the templates that make a prompt of a row."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import LorakitError
from lorakit.prompts import PROMPTS, fields_of, fill, fill_with_spans, unescaped
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


# — fields within fields —

NESTED: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
    "answers": {"text": ["Paris", "the city"], "start": [3], "none": []},
    "a.b": "dotted",
    "a": {"b": "nested", "c d": {"e": 2}},
    "grid": [["x", "y"]],
    "text": "T",
    "zero": 0,
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("messages[0].content", "Q"),
        ("messages[-1].content", "A"),
        ("answers.text[0]", "Paris"),
        ("answers.start[0]", "3"),
        ("grid[0][1]", "y"),
        ("a.c d.e", "2"),
        ("a.b", "dotted"),
    ],
)
def test_a_name_reaches_into_a_field_unless_a_field_has_just_that_name(
    name: str, text: str
) -> None:
    assert fill(f"<{{{{ {name} }}}}>", NESTED, "x:1") == f"<{text}>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("answers.txt", "no field 'answers.txt'; .*: answers.text, answers.start, answers.none$"),
        ("answer.text", "no field 'answer.text'; .*: messages, answers, a.b, a, grid, text, zero$"),
        ("messages[2].content", r"no field 'messages\[2\].content'; .*: messages\[0\] to .*\[1\]$"),
        ("messages[0].text", r"no field .*: messages\[0\].role, messages\[0\].content$"),
        ("messages.content", r"no field .*: messages\[0\] to messages\[1\]$"),
        ("text.more", "no field 'text.more'; .*: text$"),
        ("text[0]", r"no field 'text\[0\]'; .*: text$"),
        ("answers.none[0]", "no field .*: messages, "),
        ("messages[x]", "no field .*: messages, "),
        ("messages[0]]", "no field .*: messages, "),
        ("answers", "field 'answers' is not a text; use one of answers.text, answers.start"),
        (
            "answers.text",
            r"field .* is not a text; use one of answers.text\[0\] to answers.text\[1\]",
        ),
        ("answers.none", "field 'answers.none' is not a text; use another in the template"),
    ],
)
def test_a_name_that_reaches_nothing_is_told_what_there_is(name: str, message: str) -> None:
    with pytest.raises(LorakitError, match=f"^x:1: {message}"):
        fill(f"{{{{{name}}}}}", NESTED, "x:1")


KEYS = st.text(
    st.characters(exclude_characters="{}[].#/", exclude_categories=["Cs", "Z", "C"]), min_size=1
)
TREES = st.recursive(
    st.text() | st.integers(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(KEYS, inside, max_size=3),
)


def paths(value: object, name: str) -> list[tuple[str, str]]:
    """Return the name of every text and number within a value, with its text."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in paths(item, f"{name}.{key}")]
    if isinstance(value, list):
        return [leaf for n, item in enumerate(value) for leaf in paths(item, f"{name}[{n}]")]
    return [(name, str(value))]


@given(row=st.dictionaries(KEYS, TREES, max_size=3))
def test_every_text_of_a_row_can_be_named_and_its_span_is_known(row: dict[str, Any]) -> None:
    leaves = [leaf for name, value in row.items() for leaf in paths(value, name)]
    template = "".join(f"[{{{{{name}}}}}]" for name, _ in leaves)
    filled, spans = fill_with_spans(template, row, "x:1")
    assert filled == "".join(f"[{text}]" for _, text in leaves)
    assert filled == fill(template, row, "x:1")
    assert [(name, filled[start:end]) for name, start, end in spans] == leaves


# — optional parts —


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("a{{#text}} {{text}}!{{/text}} b", "a T! b"),
        ("a{{#other}} {{other}}!{{/other}} b", "a b"),
        ("a{{#empty}} {{empty}}!{{/empty}} b", "a b"),
        ("a{{#blank}} {{blank}}!{{/blank}} b", "a b"),
        ("a{{#null}} x{{/null}}{{#false}} y{{/false}}{{#list}} z{{/list}} b", "a b"),
        ("a{{#number}} {{number}}{{/number}} b", "a 0 b"),
        ("{{# text }}x{{/ text }}", "x"),
        ("{{#text}}x{{#other}}y{{/other}}{{#title}}z{{/title}}{{/text}}", "xz"),
        ("{{#text}}1{{/text}}{{#text}}2{{/text}}", "12"),
        ("{{#deep.text[0]}}{{deep.text[0]}}{{/deep.text[0]}}{{#deep.x}}no{{/deep.x}}", "D"),
        ("{{#text}}\n{{text}}\n{{/text}}", "\nT\n"),
        ("{{#hash}}", "a field of this name"),
    ],
)
def test_an_optional_part_stands_where_its_field_is_there_and_not_empty(
    template: str, filled: str
) -> None:
    row: dict[str, Any] = {
        "text": "T",
        "title": "U",
        "empty": "",
        "blank": " \n",
        "null": None,
        "false": False,
    }
    row |= {"list": [], "number": 0, "deep": {"text": ["D"]}, "#hash": "a field of this name"}
    assert fill(template, row, "x:1") == filled


@pytest.mark.parametrize(
    "template", ["{{#text}}x", "x{{/text}}", "{{#text}}{{#a}}{{/text}}{{/a}}", "{{#text}}{{/Text}}"]
)
def test_a_part_without_its_other_end_is_an_error(template: str) -> None:
    with pytest.raises(
        LorakitError, match=r"^x:1: no field '[#/]\w+'; an optional part of a .*\}\}$"
    ):
        fill(template, {"text": "T", "a": "A"}, "x:1")


def test_fields_of_optional_parts_are_listed_as_well() -> None:
    assert fields_of("{{#a}}{{b}}{{/a}}{{c.d[0]}}") == ["a", "b", "c.d[0]"]


@pytest.mark.parametrize(
    ("typed", "template"),
    [
        (r"a\nb\n", "a\nb\n"),
        (r"a\\nb", r"a\nb"),
        (r"\t \x \\ {{a}}", r"\t \x \\ {{a}}"),
        ("a\nb", "a\nb"),
        (r"\\\n", "\\\\n"),
    ],
)
def test_backslash_n_is_a_line_break_unless_escaped(typed: str, template: str) -> None:
    assert unescaped(typed) == template


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_of_the_papers_asks_for_fields_and_ends_where_the_answer_begins(name: str) -> None:
    assert fields_of(PROMPTS[name])
    assert re.search(r":$", PROMPTS[name])
    assert name in RECIPES
    assert RECIPES[name].completion.startswith(" "), "the space belongs to the completion"
