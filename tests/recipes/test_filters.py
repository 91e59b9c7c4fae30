"""Filters: what they remove or notice is counted, and said at the end."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.building import built, run, save, tallied


def write_prompts(path: Path, *prompts: str) -> Path:
    rows = (json.dumps({"prompt": prompt, "completion": "c"}) for prompt in prompts)
    return save(path, "\n".join(rows))


def test_words_are_limited_and_what_is_removed_is_counted(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a", "one", "one two", "one two three", "三つの字", "字 a 字")
    records, tally = tallied("jsonl", path, min_words=2, max_words=3)
    assert [record["prompt"] for record in records] == ["one two", "one two three", "字 a 字"]
    assert tally.removed == {
        "a prompt of fewer than 2 words": 1,
        "a prompt of more than 3 words": 1,
    }


def test_a_sample_is_drawn_of_what_the_filters_keep(tmp_path: Path) -> None:
    path = write_prompts(
        tmp_path / "a", *("long text " * (number % 2) + "x" for number in range(20))
    )
    assert len(built("jsonl", path, min_words=2, sample=10)) == 10


def test_overlap_and_repeated_prompts_are_counted_and_dropped_when_asked_for(
    tmp_path: Path,
) -> None:
    train = write_prompts(tmp_path / "train", "a", "b", "a ", " c", "d")
    test = write_prompts(tmp_path / "test", "c", "d", "e")
    records, tally = tallied("jsonl", train, overlap=(str(test),))
    assert len(records) == 5
    assert tally.noticed == {
        "prompts that an earlier record has": 1,
        f"prompts that stand in {test}": 2,
    }
    records, tally = tallied("jsonl", train, drop_overlap=(str(test),))
    assert [record["prompt"] for record in records] == ["a", "b", "a "]
    assert tally.removed == {f"a prompt that stands in {test}": 2}


def test_the_command_tells_every_count(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a", "a", "a", "a b", "a b c")
    other = write_prompts(tmp_path / "b", "a b")
    result = run("jsonl", path, "--max-words", 2, "--drop-overlap", other)
    assert result.stderr.splitlines() == [
        f"Note: removed 1: a prompt that stands in {other}.",
        "Note: removed 1: a prompt of more than 2 words.",
        "Note: prompts that an earlier record has: 1.",
    ]
    assert run("jsonl", path, "--max-words", 2, "-q").stderr == ""
