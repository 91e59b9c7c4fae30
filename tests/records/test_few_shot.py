"""Which examples are shown before a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import LorakitError
from lorakit.records.few_shot import NO_EXAMPLES, FewShot, load_few_shot, shown_turns
from lorakit.records.record import Record, Turn
from tests.support.training_data import rows, save_rows


def record(prompt: object, **fields: object) -> Record:
    return Record({"prompt": prompt, "completion": " c", **fields}, "data.jsonl:1")


def ids(few_shot: FewShot, asked: Record) -> list[str]:
    return [example.id for example in few_shot.before(asked)]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return save_rows(tmp_path / "shots.jsonl", ({**row, "id": f"s{row['id']}"} for row in rows(9)))


def test_all_examples_are_shown_in_their_order_by_default(path: str) -> None:
    few_shot = load_few_shot(path, None, 0)
    assert ids(few_shot, record("other")) == [f"s{n}" for n in range(9)]
    assert load_few_shot(None, None, 0) is NO_EXAMPLES


def test_fewer_are_drawn_by_the_seed(path: str) -> None:
    drawn = [ids(load_few_shot(path, 3, seed), record("other")) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(set(names)) for names in drawn] == [3, 3, 3]


def test_a_record_is_not_its_own_example_and_another_takes_the_place(path: str) -> None:
    few_shot = load_few_shot(path, 3, 0)
    first, *rest = few_shot.before(record("other"))
    for same in (record("other", id=first.id), record(first.prompt, id="another")):
        shown = few_shot.before(same)
        assert (len(shown), shown[:2]) == (3, tuple(rest))


def test_an_example_without_an_answer_is_named(tmp_path: Path) -> None:
    path = save_rows(tmp_path / "shots.jsonl", [{"prompt": "p"}])
    with pytest.raises(LorakitError, match=r"shots.jsonl:1: the record has no 'completion'"):
        load_few_shot(path, None, 0)


def test_examples_are_earlier_turns_after_the_system_turn() -> None:
    system = Turn("system", "s")
    conversation = record(
        [{"role": "system", "content": "of the example"}, {"role": "user", "content": "u"}]
    )
    turns = shown_turns([record("q"), conversation], (system, Turn("user", "p")))
    assert [turn.role[0] + ":" + turn.content for turn in turns] == [
        *("s:s", "u:q", "a:c", "u:u", "a:c", "u:p")
    ]
    assert shown_turns([], turns) == turns
