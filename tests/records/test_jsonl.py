"""Records: what is read, what is refused with file and line, what passes through untouched."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.records.jsonl import load_records, read_objects, read_records, write_records
from lorakit.records.record import Record

FULL = {"id": "1", "prompt": "p", "completion": "c"}


def save(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def fields_of(path: str) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in read_records(path)]


def written(*records: dict[str, Any]) -> str:
    stream = io.StringIO(newline="\n")
    assert write_records(records, stream) == len(records)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"a": "x"}\n{"a": "y"}\n', id="plain"),
        pytest.param(b'{"a": "x"}\n{"a": "y"}', id="no last line end"),
        pytest.param(b'{"a": "x"}\r\n{"a": "y"}\r\n', id="CRLF"),
        pytest.param(b'\xef\xbb\xbf{"a": "x"}\n{"a": "y"}\n', id="byte-order mark"),
        pytest.param(b'\n{"a": "x"}\n \t\r\n\n{"a": "y"}\n\n', id="empty lines"),
        pytest.param(b' {"a":"x"} \n\t{ "a" : "y" }', id="spaces"),
    ],
)
def test_lines_are_read_however_they_end(content: bytes, tmp_path: Path) -> None:
    assert fields_of(save(tmp_path / "a.jsonl", content)) == [{"a": "x"}, {"a": "y"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b"{", "not JSON (Expecting property name", id="cut short"),
        pytest.param(b"no", "not JSON (Expecting value at column 1)", id="no JSON"),
        pytest.param(b'{"a": 1} {"b": 2}', "not JSON (Extra data at column 10)", id="two"),
        pytest.param(b"[1]", "not a JSON object", id="a list"),
        pytest.param(b"null", "not a JSON object", id="null"),
        pytest.param(b'"text"', "not a JSON object", id="a text"),
        pytest.param(b'{"a": "\xff"}', "not UTF-8 text (byte 8)", id="not UTF-8"),
        pytest.param('{"a": "é"}'.encode("utf-16"), "not UTF-8 text (byte 1)", id="UTF-16"),
        pytest.param(b'{"a": NaN}', "not JSON (NaN is no JSON value)", id="NaN"),
        pytest.param(b'{"a": [-Infinity]}', "-Infinity is no JSON value", id="infinity"),
        pytest.param(b'{"a": 1e999}', "1e999 is too large a number", id="overflow"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "too many digits", id="huge whole number"),
        pytest.param(b'{"a": ' + b"[" * 100_000, "nested too deeply", id="nesting"),
    ],
)
def test_a_line_that_is_no_record_is_refused_with_file_and_line(
    line: bytes, reason: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.jsonl", b'{"id": "1"}\n\n' + line + b"\n")
    with pytest.raises(LorakitError) as caught:
        fields_of(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("; each line must be one record")


@pytest.mark.parametrize(
    ("fields", "needed", "reason"),
    [
        ({"prompt": 1}, (), "'prompt' is not a text"),
        ({"completion": None}, (), "'completion' is not a text"),
        ({"prediction": ["x"]}, (), "'prediction' is not a text"),
        ({"references": "x"}, (), "'references' is not a list of texts"),
        ({"references": []}, (), "'references' is not a list of texts"),
        ({"references": ["x", 1]}, (), "'references' is not a list of texts"),
        ({"completion": "x"}, ("prompt",), "the record has no 'prompt'"),
        ({"prompt": "x"}, ("prompt", "completion"), "the record has no 'completion'"),
        ({"prompt": "x"}, ("prediction",), "run `lorakit generate`"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_a_field_of_the_wrong_type_or_missing_is_named(
    fields: dict[str, Any], needed: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.jsonl", json.dumps(fields).encode())
    with pytest.raises(LorakitError, match=re.escape(f"{path}:1: ")) as caught:
        list(read_records(path, *needed))
    assert reason in str(caught.value)
    assert "; " in str(caught.value)


def test_objects_are_read_whatever_their_fields(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", b'{"prompt": 1, "references": "x"}')
    assert [dict(row.fields) for row in read_objects(path)] == [{"prompt": 1, "references": "x"}]


def test_reading_is_lazy_so_that_a_bad_line_comes_after_the_good_ones(tmp_path: Path) -> None:
    records = read_records(save(tmp_path / "a.jsonl", b'{"id": "1"}\nbad\n'))
    assert next(records).id == "1"
    with pytest.raises(LorakitError, match=":2: "):
        next(records)


def test_loading_gives_all_records_and_the_hash_of_the_files_bytes(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"prompt": "p"}\r\n\r\n{"prompt": "q"}'
    records, digest = load_records(save(tmp_path / "a.jsonl", content), "prompt")
    assert [record.prompt for record in records] == ["p", "q"]
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", [b"", b"\n \r\n"], ids=["empty", "blank"])
def test_loading_a_file_without_records_is_an_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"a\.jsonl holds no records; "):
        load_records(save(tmp_path / "a.jsonl", content))


def test_references_default_to_the_completion() -> None:
    assert Record(FULL, "x:1").references == ["c"]
    assert Record({**FULL, "references": None}, "x:1").references == ["c"]
    assert Record({**FULL, "references": ["a", "b"]}, "x:1").references == ["a", "b"]


def test_a_record_without_an_id_is_known_by_its_place() -> None:
    assert Record({"prompt": "p"}, "x.jsonl:7").id == "x.jsonl:7"
    assert Record({"id": 3}, "x.jsonl:7").id == "3"


def test_a_field_is_added_to_a_new_record_and_stands_last() -> None:
    record = Record(FULL, "x:1")
    assert list(record.with_field("prediction", "y").fields) == [*FULL, "prediction"]
    assert "prediction" not in record.fields


@pytest.mark.parametrize(
    "line",
    [
        pytest.param('{"z": 1, "a": 2, "id": "x"}', id="order"),
        pytest.param('{"a": {"c": [null, true, {"b": []}]}}', id="nested"),
        pytest.param('{"a": "日本語 é \U0001f600"}', id="letters as they are"),
        pytest.param('{"a": "\u2028\u2029\u0085"}', id="line separators"),
        pytest.param('{"a": "\\n\\r\\t\\u0000\\u001b"}', id="control characters"),
        pytest.param('{"a": "\\ud83d"}', id="half a surrogate pair"),
        pytest.param('{"a": 123456789012345678901234567890}', id="a large whole number"),
        pytest.param('{"a": 0.1, "b": -0.0, "c": 1e-300}', id="floats"),
        pytest.param('{"": "empty name"}', id="empty name"),
    ],
)
def test_what_is_read_is_written_again_byte_for_byte(line: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", line.encode() + b"\n")
    output = written(*fields_of(path))
    assert output.encode() == line.encode() + b"\n"


def test_each_record_is_flushed_as_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    seen = []

    def records() -> Any:
        for number in range(3):
            yield {"n": number}
            seen.append(path.read_bytes().count(b"\n"))

    with open(path, "w", encoding="utf-8") as stream:
        write_records(records(), stream)
    assert seen == [1, 2, 3]
