"""Recipes: from raw data to records, by the recipes jsonl, csv and scitldr."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.recipes.request import Request, Tally
from lorakit.recipes.table import RECIPES, build_dataset, sample_record
from lorakit.records.jsonl import read_records
from tests.support.building import built, pairs, run, save, tallied

TEMPLATES = {"template": "{{text}} =>", "completion": " {{answer}}"}


# — jsonl —


def test_a_row_becomes_id_prompt_completion_and_the_fields_that_were_not_used(
    tmp_path: Path,
) -> None:
    row = {"text": "T", "z": [1], "id": 7, "answer": "A", "a": None}
    path = save(tmp_path / "a.jsonl", json.dumps(row))
    (record,) = built("jsonl", path, **TEMPLATES)
    names = ["id", "prompt", "completion", "document", "z", "a"]
    expected = dict(zip(names, ["7", "T =>", " A", [0, 1], [1], None], strict=True))
    assert list(record.items()) == list(expected.items())


def test_rows_that_are_records_already_come_out_as_they_are(records: Path) -> None:
    assert built("jsonl", records) == [dict(record.fields) for record in read_records(str(records))]


def test_references_and_id_stay_although_a_template_names_them(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", '{"id": "i", "references": ["r"], "answer": "A"}')
    (record,) = built("jsonl", path, template="{{id}}", completion="{{answer}}")
    expected = {"id": "i", "prompt": "i", "completion": "A", "references": ["r"]}
    assert record == {**expected, "document": [0, 1]}


def test_a_row_without_an_id_is_called_after_its_place(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", '\n{"text": "T", "answer": "A"}\n')
    assert built("jsonl", path, **TEMPLATES)[0]["id"] == f"{path}:2"


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    line = '{{"id": "{}", "prompt": "p", "completion": "c"}}'
    paths = [save(tmp_path / name, line.format(name)) for name in ("b", "a")]
    assert [record["id"] for record in built("jsonl", *paths)] == ["b", "a"]


@pytest.mark.parametrize("sources", [(), ("-",)])
@pytest.mark.parametrize(
    ("recipe", "content"),
    [
        ("jsonl", '{"text": "é", "answer": "A"}\n'),
        ("csv", "text,answer\né,A\n"),
    ],
)
def test_stdin_is_read_where_no_source_is_named(
    recipe: str, content: str, sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    (record,) = built(recipe, *sources, **TEMPLATES)
    expected = {"id": record["id"], "prompt": "é =>", "completion": " A", "document": [0, 1]}
    assert record == expected
    assert record["id"].startswith("stdin:")


def test_a_missing_field_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", '{"text": "T", "answer": "A"}\n{"text": "T"}\n')
    with pytest.raises(LorakitError, match=r"a\.jsonl:2: no field 'answer'; .*: text$"):
        built("jsonl", path, **TEMPLATES)


# — csv —


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.csv", "text,answer\nT,A\nU,B\n", id="plain"),
        pytest.param("a.csv", "\ufefftext,answer\r\nT,A\r\nU,B\r\n", id="mark and CRLF"),
        pytest.param("a.csv", 'text,"answer"\n"T",A\n\nU,"B"', id="quotes and an empty line"),
        pytest.param("a.tsv", "text\tanswer\nT\tA\nU\tB\n", id="tab-separated"),
        pytest.param("a.TSV", "answer\ttext\nA\tT\nB\tU\n", id="another order"),
        pytest.param("a.csv", "text,answer\rT,A\rU,B\r", id="carriage returns alone"),
    ],
)
def test_a_table_is_read_whatever_its_line_ends(name: str, content: str, tmp_path: Path) -> None:
    records = built("csv", save(tmp_path / name, content), **TEMPLATES)
    assert pairs(records) == [("T =>", " A"), ("U =>", " B")]


def test_a_quoted_field_holds_line_ends_quotes_and_much_text(tmp_path: Path) -> None:
    long = "x" * 200_000
    path = save(tmp_path / "a.csv", f'text,answer\n"a,\r\n""b""\n","{long}"\n')
    (record,) = built("csv", path, **TEMPLATES)
    assert record["prompt"] == 'a,\r\n"b"\n =>'
    assert record["completion"] == f" {long}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", r"a\.csv is empty; ", id="empty"),
        pytest.param(b"\n\n", r"a\.csv is empty; ", id="no header"),
        pytest.param(b"a,b,a\n", r"a\.csv:1: column 'a' stands twice; ", id="column twice"),
        pytest.param(b"a,b\n1,2\n3\n", r"a\.csv:3: 1 cells where the header has 2; ", id="short"),
        pytest.param(b"a,b\n1,2,3\n", r"a\.csv:2: 3 cells where the header has 2; ", id="long"),
        pytest.param(b'a,b\n1,2\n"x"y,2\n', r"a\.csv:3: .* expected after '\"'", id="bad quote"),
        pytest.param(b'a,b\n1,"2\n', r"a\.csv:2: unexpected end of data", id="open quote"),
        pytest.param(b"a,b\n1,2\n\xff,2\n", r"a\.csv:3: not UTF-8 text; ", id="not UTF-8"),
        pytest.param(b"a,\xe9\n", r"a\.csv:1: not UTF-8 text; ", id="header not UTF-8"),
        pytest.param("a,b\n".encode("utf-16"), r"a\.csv:1: not UTF-8 text; ", id="UTF-16"),
    ],
)
def test_a_bad_table_is_an_error_that_names_file_and_line(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.csv", content)
    with pytest.raises(LorakitError, match=message):
        built("csv", path, template="{{a}}", completion="{{b}}")


# — scitldr —


@pytest.mark.parametrize(
    ("split", "count", "references"),
    [("train", 1992, {1}), ("validation", 619, {1, 2, 3, 4}), ("test", 618, {2, 3, 4})],
)
def test_scitldr_has_every_paper_and_every_reference(
    split: str, count: int, references: set[int], shared: Path
) -> None:
    records = built("scitldr", shared / "data" / "scitldr", split=split)
    assert len(records) == len({record["id"] for record in records}) == count
    assert {len(record["references"]) for record in records} == references
    for record in records:
        assert record["completion"] == f" {record['references'][0]}"
        assert record["prompt"].startswith("Write a TLDR by summarizing the following scientific")
        assert record["prompt"].endswith("\nTLDR:")
        assert list(record) == ["id", "prompt", "completion", "document", "references", "title"]


def test_a_scitldr_record_is_pinned(shared: Path) -> None:
    record = built("scitldr", shared / "data" / "scitldr" / "test.jsonl")[0]
    assert (record["id"], len(record["references"])) == ("SJ1Xmf-Rb", 2)
    assert record["title"] == "FearNet: Brain-Inspired Model for Incremental Learning"
    _, sections, _ = record["prompt"].splitlines()
    assert sections.startswith("Key Sections: Incremental class learning involves sequentially")
    assert "from the same class. This violates" in sections
    assert record["references"][1].startswith("This paper presents a novel solution to an")


def test_the_papers_fifty_shots_are_pinned(shared: Path) -> None:
    folder = shared / "data" / "scitldr"
    first, other = (
        [record["id"] for record in built("scitldr", folder, sample=5, seed=seed)]
        for seed in (0, 1)
    )
    assert first == ["HJlmhs05tm", "Hkgty1BFDS", "HJgExaVtwr", "ByebT3EYvr", "BJxcAX7iYB"]
    assert other == ["BylRqLXR9X", "HJWGdbbCW", "ryg7jhEtPB", "rJ1RPJWAW", "r1lYRjC9F7"]
    fifty = [record["id"] for record in built("scitldr", folder, sample=50)]
    assert len(fifty) == 50
    assert [name for name in fifty if name in first] == first


def test_scitldr_drops_the_space_around_sentences_and_empty_ones(tmp_path: Path) -> None:
    row = {"source": [" One. ", "", "Two."], "target": [" Short. ", " "], "paper_id": 5}
    (record,) = built("scitldr", save(tmp_path / "a.jsonl", json.dumps(row)))
    assert "Key Sections: One. Two.\n" in record["prompt"]
    assert (record["id"], record["completion"]) == ("5", " Short.")
    assert (record["references"], record["title"]) == (["Short."], "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"target": ["x"]}, "'source' is not a list of texts"),
        ({"source": "x", "target": ["x"]}, "'source' is not a list of texts"),
        ({"source": ["x"], "target": [1]}, "'target' is not a list of texts"),
        ({"source": ["x"], "target": [" "]}, "'target' holds no text"),
        ({"source": [], "target": ["x"]}, "'source' holds no text"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_what_is_no_scitldr_row_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", json.dumps(row))
    with pytest.raises(LorakitError, match=rf"a\.jsonl:1: {message}; "):
        built("scitldr", path)


def test_scitldr_needs_a_source_and_the_splits_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="scitldr needs its folder or a file"):
        built("scitldr")
    with pytest.raises(LorakitError, match=r"has no dev\.jsonl for --split validation; "):
        built("scitldr", tmp_path, split="validation")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
@pytest.mark.parametrize("file", ["dialogsum.dev.jsonl", "valid.jsonl", "val.csv"])
def test_the_validation_split_may_be_called_by_any_of_its_names(
    name: str, file: str, tmp_path: Path
) -> None:
    row = {"fname": "d", "dialogue": "#Person1#: Hi.", "summary": "A greeting.", "topic": "t"}
    header = ",".join(row)
    text = f"{header}\n{','.join(row.values())}\n" if file.endswith("csv") else json.dumps(row)
    save(tmp_path / file, text)
    save(tmp_path / "train.jsonl", json.dumps({**row, "summary": "Another."}))
    result = run("dialogsum", tmp_path, "--split", name)
    assert [json.loads(line)["completion"] for line in result.stdout.splitlines()] == [
        " A greeting."
    ]


# — the command —


def test_the_command_writes_the_records_of_the_library(records: Path) -> None:
    result = run("jsonl", records)
    assert result.stdout == records.read_text(encoding="utf-8")
    assert (result.exit_code, result.stderr) == (0, "")


def test_the_command_writes_to_a_file_and_says_nothing(records: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    result = run("jsonl", records, "-o", target)
    assert (result.exit_code, result.output) == (0, "")
    assert target.read_bytes() == records.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "count", "note"),
    [
        (("--sample", 2), 2, ""),
        (("--sample", 3), 3, ""),
        (("--sample", 4), 3, "Note: only 3 records for --sample 4.\n"),
        (("--sample", 4, "-q"), 3, ""),
    ],
)
def test_a_sample_larger_than_the_data_is_said(
    arguments: tuple[object, ...], count: int, note: str, records: Path
) -> None:
    result = run("jsonl", records, *arguments)
    assert len(result.stdout.splitlines()) == count
    assert result.stderr == note


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nothing",),
        ("jsonl", "-", "-"),
        ("jsonl", "--sample", 0),
        ("jsonl", "--split", "later"),
        ("jsonl", "--seed", -1),
    ],
    ids=repr,
)
def test_wrong_usage_exits_with_2(arguments: tuple[object, ...]) -> None:
    result = run(*arguments, stdin="")
    assert result.exit_code == 2
    assert result.stdout == ""


def test_a_bad_row_leaves_the_old_output(tmp_path: Path) -> None:
    target = save(tmp_path / "out", "old")
    result = run("jsonl", "-o", target, stdin='{"prompt": "p", "completion": "c"}\nbad\n')
    assert isinstance(result.exception, LorakitError)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_help_lists_every_recipe() -> None:
    text = run("--help").stdout
    assert all(f"  {name} " in text and recipe.help in text for name, recipe in RECIPES.items())


def test_a_task_of_the_microworld_is_a_source() -> None:
    records = built("microworld", "echo", split="test", sample=3)
    assert [set(record) >= {"id", "prompt", "completion"} for record in records] == [True] * 3
    for sources in ((), ("echo", "first")):
        with pytest.raises(LorakitError, match="microworld takes one task as SOURCE"):
            built("microworld", *sources)


# — every recipe —


QUOTED = ("hotpotqa", "ecommerce")  # the answer stands in the prompt


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "chat"])
def test_every_recipe_shows_a_record_of_its_documented_row(recipe: str) -> None:
    record = sample_record(recipe, Request())
    assert list(record)[:3] == ["id", "prompt", "completion"]
    assert str(record["id"]).strip()
    assert str(record["completion"]).startswith(" ")
    assert "{{" not in str(record["prompt"])
    assert str(record["completion"]).strip() not in str(record["prompt"]) or recipe in QUOTED


@pytest.mark.parametrize("recipe", ["jstage", "latex", "wikilingua"])
def test_a_sample_row_in_another_language_is_an_error(recipe: str) -> None:
    with pytest.raises(LorakitError, match=rf"the sample row of {recipe} is left out \(.*\); "):
        sample_record(recipe, Request(lang="zh"))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("gsm8k",), "Natalia"),
        (("jsonl", "FILE"), "The cat"),
        (("hf",), "A long"),
    ],
    ids=repr,
)
def test_show_prints_one_record_of_a_source_or_of_the_sample(
    arguments: tuple[str, ...], shown: str, records: Path
) -> None:
    result = run(*(str(records) if word == "FILE" else word for word in arguments), "--show")
    assert (result.exit_code, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    assert shown in json.loads(line)["prompt"]


@pytest.mark.parametrize(
    ("recipe", "option"),
    [("jsonl", {"min_ratio": 2.0}), ("latex", {"highlights": "ul"}), ("mimic", {"source": "en"})],
)
def test_an_option_of_another_recipe_is_refused(recipe: str, option: dict[str, Any]) -> None:
    with pytest.raises(LorakitError, match=rf"^{recipe} has no --.*; .* a recipe that has: "):
        built(recipe, "x", **option)


@pytest.mark.parametrize(
    ("recipe", "name", "request_", "count"),
    [
        ("gsm8k", "gsm8k", {}, 7473),
        ("gsm8k", "gsm8k", {"split": "test"}, 1319),
        ("hotpotqa", "hotpotqa", {"split": "validation"}, 479),
        ("wmt", "wmt23-en-zh", {}, 2074),
        ("jawikinews", "jawikinews", {}, 3670),
        ("jemhopqa", "jemhopqa", {}, 1059),
        ("jemhopqa", "jemhopqa", {"split": "validation"}, 120),
        ("dialogsum", "dialogsum", {"split": "validation"}, 500),
        ("dialogsum", "dialogsum", {"split": "test"}, 500),
    ],
)
def test_the_published_data_sets_come_out_whole(
    recipe: str, name: str, request_: dict[str, Any], count: int, shared: Path
) -> None:
    records, tally = tallied(recipe, shared / "data" / name, **request_)
    assert len(records) == len({record["id"] for record in records}) == count
    assert (tally.skipped, tally.removed) == (0, {})
    assert all(record["prompt"] and record["completion"].strip() for record in records)
    end = RECIPES[recipe].prompt.rpartition("\n")[2].rpartition("}")[2]
    assert all(record["prompt"].endswith(end) for record in records)


def test_records_of_the_published_data_sets_are_pinned(shared: Path) -> None:
    data = shared / "data"
    first = {
        "gsm8k": built("gsm8k", data / "gsm8k", split="test")[0],
        "wmt": built("wmt", data / "wmt23-en-zh")[0],
        "jawikinews": built("jawikinews", data / "jawikinews")[0],
        "dialogsum": built("dialogsum", data / "dialogsum", split="test")[0],
    }
    assert first["gsm8k"]["id"] == "test.jsonl:1"
    assert first["gsm8k"]["completion"].endswith("farmer’s market.\n#### 18")
    assert first["wmt"]["prompt"].startswith(
        "Translate from English to Chinese.\nEnglish: The hack"
    )
    assert first["wmt"]["completion"].startswith(" 绝地武士的破解版崩溃了，因为它")
    assert "2011年4月7日午後11時32分頃(UTC+9)、日本の宮城県沖" in first["jawikinews"]["prompt"]
    assert first["jawikinews"]["completion"].startswith(" 宮城県沖でマグニチュード7.4東北各地で")
    assert len(first["dialogsum"]["references"]) == 3


# — malformed rows —


BROKEN = (
    '{"prompt": "p", "completion": "c"}\nbad\n{"prompt": "p"}\n{"prompt": "q", "completion": 1}\n'
)


def test_malformed_rows_are_skipped_named_and_counted_when_asked_for() -> None:
    result = run("jsonl", "--on-error", "skip", stdin=BROKEN)
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["p", "q"]
    named, missing, total = result.stderr.splitlines()
    assert named.startswith("Note: skipped stdin:2: not JSON")
    assert missing.startswith("Note: skipped stdin:3: no field 'completion'")
    assert total == "Note: skipped 2 malformed rows in all."


def test_only_the_first_malformed_rows_are_named(tmp_path: Path) -> None:
    notes: list[str] = []
    tally = Tally(skip=True, say=notes.append)
    path = save(tmp_path / "a.jsonl", "bad\n" * 50)
    assert list(build_dataset("jsonl", [str(path)], None, tally)) == []
    assert (len(notes), tally.skipped) == (10, 50)


@pytest.mark.parametrize(
    ("content", "prompts", "skipped"),
    [
        pytest.param(b"a,b\n1,2\n3\n4,5\n", ["1", "4"], 1, id="short row"),
        pytest.param(b'a,b\n1,2\n"x"y,2\n4,5\n', ["1", "4"], 1, id="bad quote"),
        pytest.param(b"a,b\n\xff,2\n4,5\n", ["4"], 1, id="not UTF-8"),
    ],
)
def test_rows_of_a_table_are_skipped(
    content: bytes, prompts: list[str], skipped: int, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.csv", content)
    records, tally = tallied("csv", path, template="{{a}}", completion="{{b}}")
    assert [record["prompt"] for record in records] == prompts
    assert tally.skipped == skipped


def test_an_open_quote_that_takes_the_rest_of_a_table_is_never_skipped(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", 'a,b\n1,"2\n3,4\n5,6\n')
    with pytest.raises(LorakitError, match="unexpected end of data"):
        tallied("csv", path, template="{{a}}", completion="{{b}}")


# — JSON arrays —


def test_an_array_is_read_as_lines_are_with_numbered_records(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "completion": "é" * 300} for number in range(9000)]
    path = save(tmp_path / "a.json", "\ufeff " + json.dumps(rows, ensure_ascii=False, indent=1))
    records = built("jsonl", path)
    assert [record["prompt"] for record in records] == [row["prompt"] for row in rows]
    assert records[8999]["id"] == f"{path}: record 9000"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"the end of the file where the JSON array needs|record 1: not JSON"),
        ('[{"a": 1}', "the end of the file where the JSON array needs ','"),
        ('[{"a": 1} {"a": 2}]', r"'\{' where the JSON array needs ','"),
        ('[{"a": 1}] x', "text after the array's end"),
        ('[{"a": }]', r"record 1: not JSON \(Expecting value"),
        ("[1]", "record 1: not a JSON object"),
        ("[" + "[" * 100_000, "record 1: not JSON"),
        ('[{"a": NaN}]', r"record 1: not JSON \(NaN"),
        (b'[{"a": "\xff"}]', "not UTF-8 text"),
    ],
    ids=repr,
)
def test_a_broken_array_names_file_and_record(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.json", content)
    with pytest.raises(LorakitError, match=rf"a\.json: (?:{message}).*; "):
        built("jsonl", path, template="{{a}}", completion="{{a}}")
