"""Conversations of every form become records with `messages`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorakit.errors import LorakitError
from lorakit.recipes.request import Request
from lorakit.recipes.table import sample_record
from tests.support.building import Fields, built, run, save, tallied


def turn(role: str, content: object, **fields: object) -> Fields:
    return {"role": role, "content": content, **fields}


def said(role: str, text: str) -> Fields:
    return {"from": role, "value": text}


ASK, ANSWER = turn("user", "Q"), turn("assistant", "A")
SYSTEM = turn("system", "S")


def chat(tmp_path: Path, *rows: Fields) -> list[Fields]:
    return built("chat", save(tmp_path / "a.jsonl", lines(*rows)))


def lines(*rows: Fields) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        pytest.param({"messages": [ASK, ANSWER]}, [ASK, ANSWER], id="messages"),
        pytest.param(
            {"messages": [SYSTEM, ASK, ANSWER, ASK, ANSWER]},
            [SYSTEM, ASK, ANSWER, ASK, ANSWER],
            id="several turns",
        ),
        pytest.param(
            {"messages": [turn("developer", "S"), ASK, ANSWER]}, [SYSTEM, ASK, ANSWER], id="OpenAI"
        ),
        pytest.param(
            {"messages": [turn("user", [{"type": "text", "text": "Q"}]), ANSWER]},
            [ASK, ANSWER],
            id="text parts",
        ),
        pytest.param(
            {"messages": [{**ASK, "tool_calls": None, "name": None}, ANSWER]},
            [ASK, ANSWER],
            id="empty fields",
        ),
        pytest.param(
            {"conversations": [said("system", "S"), said("human", "Q"), said("gpt", "A")]},
            [SYSTEM, ASK, ANSWER],
            id="ShareGPT",
        ),
        pytest.param(
            {"conversations": [said("Human", "Q"), said("ChatGPT", "A")], "system": "S"},
            [SYSTEM, ASK, ANSWER],
            id="ShareGPT with a system field",
        ),
        pytest.param({"conversations": [ASK, ANSWER]}, [ASK, ANSWER], id="roles in conversations"),
        pytest.param({"instruction": "Q", "input": "", "output": "A"}, [ASK, ANSWER], id="Alpaca"),
        pytest.param({"instruction": "Q", "output": "A"}, [ASK, ANSWER], id="no input"),
        pytest.param(
            {"instruction": "I", "input": "N", "output": "A"},
            [turn("user", "I\nN"), ANSWER],
            id="Alpaca with input",
        ),
        pytest.param(
            {"instruction": "I", "output": "B", "system": "S", "history": [["Q", "A"]]},
            [SYSTEM, ASK, ANSWER, turn("user", "I"), turn("assistant", "B")],
            id="Alpaca with history",
        ),
        pytest.param(
            {"prompt": [SYSTEM, ASK], "completion": [ANSWER]}, [SYSTEM, ASK, ANSWER], id="TRL"
        ),
        pytest.param(
            {"messages": [ASK, ANSWER, ASK, {**ANSWER, "weight": 0}]},
            [ASK, ANSWER],
            id="last answer of weight 0",
        ),
        pytest.param(
            {"messages": [ASK, {**ANSWER, "weight": 0}, ASK, {**ANSWER, "weight": 1}]},
            [ASK, ANSWER, ASK, ANSWER],
            id="first answer of weight 0",
        ),
    ],
)
def test_every_form_becomes_messages(row: Fields, messages: list[Fields], tmp_path: Path) -> None:
    assert chat(tmp_path, row) == [{"id": "a.jsonl:1", "messages": messages}]


def test_other_fields_pass_through_and_the_id_stays(tmp_path: Path) -> None:
    row = {"z": 1, "messages": [ASK, ANSWER], "id": 7, "references": ["A"]}
    (record,) = chat(tmp_path, row)
    expected = {"id": "7", "messages": [ASK, ANSWER], "z": 1, "references": ["A"]}
    assert list(record.items()) == list(expected.items())


def test_records_of_conversations_come_out_as_they_are(tmp_path: Path) -> None:
    (record,) = chat(tmp_path, {"id": "c", "system": "S", "messages": [ASK, ANSWER], "a": 1})
    assert chat(tmp_path, record) == [record]


def test_a_system_turn_wins_over_a_system_field(tmp_path: Path) -> None:
    (record,) = chat(tmp_path, {"system": "other", "messages": [SYSTEM, ASK, ANSWER]})
    assert (record["messages"][0], record["system"]) == (SYSTEM, "other")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASK]}, "the conversation ends in a turn of the user; "),
        ({"messages": [ASK, ANSWER, SYSTEM]}, "the conversation ends in a turn of the system; "),
        ({"messages": [ANSWER]}, "the conversation has no turn of the user; "),
        ({"messages": []}, "'messages' is not a list of turns; "),
        ({"messages": "Q"}, "'messages' is not a list of turns; "),
        ({"messages": ["Q"]}, "turn 1 of 'messages' is not an object with role and content; "),
        ({"messages": [ASK, turn("tool", "x"), ANSWER]}, "turn 2 has the role 'tool'; "),
        ({"messages": [{"content": "x"}]}, "turn 1 has no role; "),
        ({"messages": [turn("user", " "), ANSWER]}, "turn 1 is empty; "),
        ({"messages": [ASK, turn("assistant", None)]}, "turn 2 is empty; "),
        ({"messages": [turn("user", {"a": 1}), ANSWER]}, "the content of turn 1 is not a text; "),
        (
            {"messages": [turn("user", [{"type": "image_url"}, {"type": "text"}]), ANSWER]},
            r"turn 1 holds other things than text \(image_url\); ",
        ),
        (
            {"messages": [ASK, turn("assistant", None, tool_calls=[{"id": 1}])]},
            "turn 2 calls a tool; ",
        ),
        ({"instruction": "Q", "output": ""}, "turn 2 is empty; "),
        ({"instruction": 1, "output": "A"}, "the instruction is not a text; "),
        ({"instruction": "Q", "output": "A", "history": ["x"]}, "'history' is not a list of pairs"),
        ({"prompt": "Q", "completion": "A"}, "no conversation in the fields prompt, completion; "),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_what_cannot_be_learnt_names_file_line_and_remedy(
    row: Fields, message: str, tmp_path: Path
) -> None:
    good = {"messages": [ASK, ANSWER]}
    path = save(tmp_path / "a.jsonl", lines(good, row, good))
    with pytest.raises(LorakitError, match=rf"a\.jsonl:2: {message}"):
        built("chat", path)
    records, tally = tallied("chat", path)
    assert (len(records), tally.skipped) == (2, 1)


def test_conversations_of_weight_0_are_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", lines({"messages": [ASK, {**ANSWER, "weight": 0}]}))
    records, tally = tallied("chat", path)
    assert records == []
    assert tally.removed == {"a conversation whose answers all have weight 0": 1}


def test_fields_of_turns_that_are_lost_are_counted(tmp_path: Path) -> None:
    row = {"messages": [{**ASK, "name": "Ann"}, {**ANSWER, "name": "Bot"}]}
    records, tally = tallied("chat", save(tmp_path / "a.jsonl", lines(row)))
    assert records[0]["messages"] == [ASK, ANSWER]
    assert tally.noticed == {"conversations whose turns lose the field 'name'": 1}


def test_tables_and_parquet_are_read_as_lines_are(tmp_path: Path) -> None:
    table = save(tmp_path / "a.csv", "instruction,input,output\nQ,,A\n")
    assert built("chat", table)[0]["messages"] == [ASK, ANSWER]
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": [ASK, ANSWER]}]), parquet)
    assert built("chat", parquet)[0]["messages"] == [ASK, ANSWER]


def test_templates_reach_into_conversations(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.jsonl", lines({"conversations": [said("human", "Q"), said("gpt", "A")]})
    )
    templates = {"template": "{{messages[0].content}}:", "completion": " {{messages[-1].content}}"}
    (record,) = built("chat", path, **templates)
    assert record == {"id": "a.jsonl:1", "prompt": "Q:", "completion": " A", "document": [0, 1]}
    with pytest.raises(LorakitError, match="give --template and --completion, or leave both out"):
        built("chat", path, template="{{messages[0].content}}")


def test_repeated_and_overlapping_questions_are_counted_and_dropped(tmp_path: Path) -> None:
    other = {"messages": [turn("user", "R"), ANSWER]}
    path = save(tmp_path / "a.jsonl", lines({"messages": [ASK, ANSWER]}, other))
    others = save(tmp_path / "val.jsonl", json.dumps(built("chat", path)[1]))
    assert [r["id"] for r in built("chat", path, drop_overlap=(str(others),))] == ["a.jsonl:1"]
    _, tally = tallied("chat", path, path, overlap=(str(others),))
    assert tally.noticed == {
        "prompts that an earlier record has": 2,
        f"prompts that stand in {others}": 2,
    }


def test_short_conversations_are_dropped_by_their_words(tmp_path: Path) -> None:
    rows = [{"messages": [turn("user", text), ANSWER]} for text in ("one", "one two")]
    path = save(tmp_path / "a.jsonl", lines(*rows))
    assert [r["id"] for r in built("chat", path, min_words=2)] == ["a.jsonl:2"]


def test_the_documented_conversation_is_a_record() -> None:
    record: Any = sample_record("chat", Request())
    assert list(record) == ["id", "messages"]
    assert [turn["role"] for turn in record["messages"]] == ["system", "user", "assistant"]


def test_the_command_writes_conversations(tmp_path: Path) -> None:
    result = run("chat", stdin=lines({"messages": [ASK, ANSWER]}))
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {"id": "stdin:1", "messages": [ASK, ANSWER]}
