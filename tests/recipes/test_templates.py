"""From rows to records: the span of the document, and what a template of one's own does to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.errors import LorakitError
from lorakit.prompts import fields_of
from lorakit.recipes.microworld.probes import PROBE_PROMPTS
from lorakit.recipes.microworld.tasks import TASK_PROMPTS
from lorakit.recipes.microworld.world import TASKS
from lorakit.recipes.request import Request
from lorakit.recipes.table import RECIPES, sample_record
from lorakit.recipes.templates import Templates
from lorakit.records.record import Record
from tests.support.building import built, save

WITH_DOCUMENT = [name for name, recipe in RECIPES.items() if recipe.document]
SHOWN: dict[str, str] = {  # of the documented rows: where the document begins, and where it ends
    "xlsum": "英首相は17日、|説明した。",
    "wikilingua": "Use a sharp knife. |from yourself.",
    "scitldr": "We study the loss of |analysis is exact.",
    "mimic": "The heart is normal|[**Hospital1 18**].",
    "news-html": "Shares rose by two percent|of its larger rivals.",
    "latex": "本稿では|向上した．",
    "jstage": "症例は60歳の男性。|当院を受診した。",
    "hotpotqa": "Mahbub ul Haq: Mahbub|He wrote much.",
    "samsum": "Amanda: I baked|Jerry: Sure!",
    "dialogsum": "#Person1#: Take a memo.|Yes, sir.",
    "ecommerce": "有现货吗|什么时候发货",
    "jawikinews": "気象庁は|と発表した。",
}
AROUND = re.compile(r"\{\{.*?\}\}")


def document_of(record: dict[str, Any]) -> str:
    start, end = record["document"]
    return str(record["prompt"][start:end])


def around(record: dict[str, Any]) -> tuple[str, str]:
    start, end = record["document"]
    return record["prompt"][:start], record["prompt"][end:]


def test_the_recipes_with_a_document_are_those_of_texts_to_read() -> None:
    assert list(SHOWN) == WITH_DOCUMENT


@pytest.mark.parametrize("recipe", WITH_DOCUMENT)
def test_the_span_is_the_whole_document_and_leaves_instruction_question_and_cue(
    recipe: str,
) -> None:
    record = sample_record(recipe, Request())
    document, (before, after) = document_of(record), around(record)
    start, end = SHOWN[recipe].split("|")
    assert document.startswith(start)
    assert document.endswith(end)
    assert document == document.strip()
    template = RECIPES[recipe].prompt
    head, tail = template.split(f"{{{{{RECIPES[recipe].document}}}}}")
    assert before == head
    assert re.fullmatch(".+".join(map(re.escape, AROUND.split(tail))), after, re.DOTALL)


@pytest.mark.parametrize("recipe", WITH_DOCUMENT)
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_whatever_the_fields_hold_the_span_is_the_documents_text(
    recipe: str, data: st.DataObject
) -> None:
    entry = RECIPES[recipe]
    names = {*fields_of(entry.prompt), *fields_of(entry.completion)}
    row = {name: data.draw(st.text(), label=name) for name in sorted(names)}
    row[entry.document] += "."
    templates = Templates(entry.prompt, entry.completion, entry.document)
    record = dict(templates.record(Record(row, "x:1")).fields)
    assert document_of(record) == row[entry.document]
    before, after = around(record)
    head, tail = entry.prompt.split(f"{{{{{entry.document}}}}}")
    assert before == head
    for name in fields_of(tail):
        tail = tail.replace(f"{{{{{name}}}}}", row[name], 1)
    assert after == tail


@pytest.mark.parametrize(
    "recipe", sorted({*RECIPES} - {*WITH_DOCUMENT, "microworld"}), ids=lambda name: name
)
def test_the_other_recipes_write_no_span(recipe: str) -> None:
    assert "document" not in sample_record(recipe, Request())


# — the microworld —

PROMPTS = {**TASK_PROMPTS, **PROBE_PROMPTS}


@pytest.mark.parametrize(("task", "lang"), PROMPTS, ids="-".join)
def test_a_span_of_the_microworld_is_its_text_and_leaves_the_words_around(
    task: str, lang: str
) -> None:
    for record in built("microworld", task, lang=lang, sample=20):
        if task in ("echo", "continue", "count", "translate"):
            assert "document" not in record
            continue
        before, after = around(record)
        first, *_, last = re.split(r"\{\w+\}", PROMPTS[task, lang])
        assert before.startswith(first.split("\n")[0][:5])
        assert after.endswith(last)
        text = document_of(record)
        assert text.strip() == text
        between = re.split(r"\{(?:text|a|b)\}", PROMPTS[task, lang])
        assert before.endswith(re.split(r"\{\w+\}", between[0])[-1])
        assert after.startswith(re.split(r"\{\w+\}", between[-1])[0])
        assert TASKS[task].document


# — templates of one's own —

ROW = {"title": "T", "text": "A long text.", "note": "Longer than the text."}


@pytest.mark.parametrize(
    ("template", "document", "expected"),
    [
        pytest.param("{{title}}: {{text}} =>", None, "A long text.", id="the longest"),
        pytest.param("{{text}} {{note}} =>", None, "Longer than the text.", id="of those there"),
        pytest.param("{{title}} {{title}}", None, "T", id="the first of equals"),
        pytest.param("{{title}}: {{text}} =>", "title", "T", id="the one that is named"),
        pytest.param("{{#text}}{{title}}{{/text}}{{text}}", "title", "T", id="optional part"),
        pytest.param("no field", None, None, id="no field"),
        pytest.param("{{#none}}{{none}}{{/none}}{{text}}", "none", None, id="left out"),
    ],
)
def test_the_document_of_ones_own_template(
    template: str, document: str | None, expected: str | None, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.jsonl", json.dumps(ROW))
    (record,) = built("jsonl", path, template=template, completion="x", document=document)
    assert (document_of(record) if "document" in record else None) == expected


def test_of_equal_fields_the_first_is_the_document(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", '{"a": "xy", "b": "zw"}')
    (record,) = built("jsonl", path, template="{{a}}{{b}}", completion="x")
    assert record["document"] == [0, 2]


def test_a_recipe_knows_its_document_in_another_template_too(tmp_path: Path) -> None:
    row = {"text": "Short.", "summary": "s", "title": "A title longer than the article"}
    path = save(tmp_path / "a.jsonl", json.dumps(row))
    (record,) = built("xlsum", path, template="{{title}}: {{article}}")
    assert document_of(record) == "Short."


def test_a_document_that_the_template_lacks_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", json.dumps(ROW))
    with pytest.raises(LorakitError, match=r"has no \{\{note\}\} for --document; .*: title, text$"):
        built("jsonl", path, template="{{title}}{{text}}", completion="x", document="note")


def test_the_span_of_a_record_passes_through(tmp_path: Path) -> None:
    record = {"id": "1", "prompt": "a b c", "completion": " d", "document": [2, 3]}
    assert built("jsonl", save(tmp_path / "a.jsonl", json.dumps(record))) == [record]


def test_a_field_that_a_template_reaches_into_is_not_repeated(tmp_path: Path) -> None:
    row = {"q": "Q", "answers": {"text": ["A", "B"], "start": [1]}, "level": 2}
    path = save(tmp_path / "a.jsonl", json.dumps(row))
    (record,) = built("jsonl", path, template="{{q}}", completion=" {{answers.text[0]}}")
    assert record["completion"] == " A"
    assert list(record) == ["id", "prompt", "completion", "document", "level"]


def test_a_line_break_is_typed_as_backslash_n(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", json.dumps(ROW))
    (record,) = built("jsonl", path, template=r"{{title}}\n\\n\t", completion=r"\n{{text}}")
    assert record["prompt"] == "T\n\\n\\t"
    assert record["completion"] == "\nA long text."


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "x"}]},
        {"conversations": []},
        {"prompt": [{"role": "user", "content": "x"}], "completion": []},
    ],
    ids=lambda row: next(iter(row)),
)
def test_a_conversation_among_prompts_is_sent_to_its_recipe(
    row: dict[str, Any], tmp_path: Path
) -> None:
    path = save(tmp_path / "a.jsonl", json.dumps(row))
    with pytest.raises(LorakitError, match=r"a\.jsonl:1: a conversation, .* the recipe chat, "):
        built("jsonl", path)
