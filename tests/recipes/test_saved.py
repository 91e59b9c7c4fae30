"""Data sets saved to disk: folders of Arrow files, laid out as `datasets` does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from lorakit.errors import LorakitError
from tests.support.building import built, run, save

TEMPLATES = {"template": "{{q}}", "completion": "{{a}}"}


def save_split(folder: Path, split: str | None, *tables: list[dict[str, Any]]) -> Path:
    """Lay out one split as Dataset.save_to_disk does."""
    names = [f"data-{n:05d}-of-{len(tables):05d}.arrow" for n in range(len(tables))]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(names, tables, strict=True):
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split}
    save(folder / "state.json", json.dumps(state))
    save(folder / "dataset_info.json", "{}")
    return folder


def save_dict(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """Lay out several splits as DatasetDict.save_to_disk does."""
    for name, rows in splits.items():
        save_split(folder / name, name, rows)
    save(folder / "dataset_dict.json", json.dumps({"splits": list(splits)}))
    return folder


def rows(*names: str) -> list[dict[str, Any]]:
    return [{"q": name, "a": "x", "n": [1]} for name in names]


def prompts(source: Path, **request: Any) -> list[str]:
    return [record["prompt"] for record in built("hf", source, **TEMPLATES, **request)]


def test_a_saved_split_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    many = [str(number) for number in range(700)]
    save_split(tmp_path / "d", "train", rows(*many), rows("last"))
    records = built("hf", tmp_path / "d", **TEMPLATES)
    assert [record["prompt"] for record in records] == [*many, "last"]
    assert records[0]["n"] == [1]
    assert records[299]["id"].endswith("data-00000-of-00002.arrow: record 300")


def test_a_saved_split_without_its_state_is_read_by_the_names_of_its_files(tmp_path: Path) -> None:
    save_split(tmp_path, "train", rows("1"), rows("2"))
    (tmp_path / "state.json").unlink()
    assert prompts(tmp_path) == ["1", "2"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", ["t"]), ("validation", ["v"]), ("val", ["v"]), ("test_sft", ["s"])],
)
def test_a_split_is_chosen_by_its_name_or_an_alias(
    split: str, expected: list[str], tmp_path: Path
) -> None:
    save_dict(tmp_path, {"train": rows("t"), "dev": rows("v"), "test_sft": rows("s")})
    assert prompts(tmp_path, split=split) == expected


def test_of_two_validation_splits_the_one_of_that_name_is_read(tmp_path: Path) -> None:
    save_dict(tmp_path, {"dev": rows("d"), "validation": rows("v")})
    assert prompts(tmp_path, split="dev") == ["d"]
    assert prompts(tmp_path, split="validation") == prompts(tmp_path, split="val") == ["v"]


def test_a_missing_split_is_named_with_those_there_are(tmp_path: Path) -> None:
    save_dict(tmp_path / "d", {"train_sft": rows("t"), "test_sft": rows("s")})
    message = r"d has no split train; give --split with one of test_sft, train_sft$"
    with pytest.raises(LorakitError, match=message):
        prompts(tmp_path / "d")
    result = run(
        "hf", tmp_path / "d", "--split", "train_sft", "--template", "{{q}}", "--completion", "x"
    )
    assert json.loads(result.stdout)["prompt"] == "t"


def test_a_split_saved_alone_is_read_but_for_another_that_is_asked_for(tmp_path: Path) -> None:
    save_split(tmp_path / "d", "test", rows("t"))
    assert prompts(tmp_path / "d") == prompts(tmp_path / "d", split="test") == ["t"]
    with pytest.raises(LorakitError, match="d holds the split test alone; leave out --split valid"):
        prompts(tmp_path / "d", split="validation")


def test_conversations_are_read_from_a_saved_data_set(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    save_dict(tmp_path, {"train_sft": [{"messages": turns}]})
    (record,) = built("chat", tmp_path, split="train_sft")
    assert record == {"id": "data-00000-of-00001.arrow:1", "messages": turns}


@pytest.mark.parametrize("recipe", ["hf", "chat"])
def test_a_file_has_no_splits_of_its_own(recipe: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", "{}")
    with pytest.raises(LorakitError, match=r"a\.jsonl has no splits; leave out --split train_sft"):
        built(recipe, path, split="train_sft")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state.json": "{"}, r"state\.json: not JSON; "),
        ({"state.json": "{}"}, r"d has no data-\*\.arrow; "),
        ({"state.json": '{"_indices_files": [{"filename": "i.arrow"}]}'}, r"flatten_indices\(\)"),
        ({"state.json": '{"_data_files": [{"filename": "../x.arrow"}]}'}, "has no data-"),
        ({"dataset_dict.json": "{}"}, "d has no split train; give --split with one of none"),
        ({"state.json": "{}", "data-0.arrow": "no arrow"}, r"data-0\.arrow: not Arrow \(.*\); "),
        ({"state.json": "{}", "data-0.arrow": ""}, r"data-0\.arrow: not Arrow \(.*\); "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_damaged_folder_is_one_line(
    content: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, text in content.items():
        save(tmp_path / "d" / name, text)
    with pytest.raises(LorakitError, match=message):
        prompts(tmp_path / "d")


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    save_split(tmp_path / "d", "train", rows(*map(str, range(1000))))
    path = next((tmp_path / "d").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(LorakitError, match=r"\.arrow: not Arrow \("):
        prompts(tmp_path / "d")


def test_a_missing_pyarrow_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_split(tmp_path, "train", rows("1"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LorakitError, match=r"pip install 'lorakit\[parquet\]'"):
        prompts(tmp_path)
