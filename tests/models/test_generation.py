from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import LorakitError
from lorakit.models import predictions
from lorakit.models.base import Base
from lorakit.models.generation import complete, generate, window_size
from lorakit.models.predictions import write_predictions
from lorakit.records import Record
from lorakit.reporting import Silent
from lorakit.settings import GenerationSettings
from tests.support.models import open_base
from tests.support.training_data import rows, save_rows

SETTINGS = GenerationSettings(max_new_tokens=6, batch_size=4, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def base(llama: str) -> Base:
    return open_base(llama)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def records(count: int) -> list[Record]:
    return [Record(row, f"data:{row['id']}") for row in rows(count)]


def predict(base: Base, sample: list[Record], **changes: Any) -> list[str]:
    settings = replace(SETTINGS, **changes)
    completed = generate(base, base.encoder(chat="off"), sample, settings)
    return [record.prediction for record, _ in completed]


def test_greedy_decoding_takes_the_most_probable_token_each_time(base: Base) -> None:
    """Against the plain loop: the whole sequence through the model for every token, no cache."""
    prompt = base.encoder(chat="off").prompt(records(1)[0], 6).ids
    ids = list(prompt)
    new: list[int] = []
    while len(new) < 6:
        token = int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in base.end_tokens:
            break
        ids.append(token)
        new.append(token)
    assert complete(base, [prompt], SETTINGS) == [new]


def test_batched_output_equals_one_by_one_output_in_float32(base: Base) -> None:
    sample = records(23)
    assert predict(base, sample) == predict(base, sample, batch_size=1)


def test_records_come_out_in_the_order_they_went_in(base: Base) -> None:
    sample = records(11)
    completed = generate(base, base.encoder(chat="off"), sample, SETTINGS)
    assert [r.id for r, _ in completed] == [r.id for r in sample]


def test_generation_stops_at_the_end_token(base: Base) -> None:
    prompt = base.encoder(chat="off").prompt(records(1)[0], 6).ids
    first = complete(base, [prompt], SETTINGS)[0][0]
    stopping = replace(base, end_tokens=(base.end_tokens[0], first))
    assert complete(stopping, [prompt], SETTINGS) == [[]]


def test_records_are_read_a_window_at_a_time(base: Base) -> None:
    taken = 0

    def counted() -> Iterator[Record]:
        nonlocal taken
        for record in records(window_size(SETTINGS) + 5):
            taken += 1
            yield record

    next(generate(base, base.encoder(chat="off"), counted(), SETTINGS))
    assert taken == window_size(SETTINGS)


def test_sampling_repeats_with_its_seed_and_differs_with_another(base: Base) -> None:
    sample = records(6)
    hot = [predict(base, sample, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]


def write(base: Base, data: str, output: Path, resume: bool = False, **changes: Any) -> list[str]:
    notes = Notes()
    settings = replace(SETTINGS, **{"batch_size": 1, **changes})
    write_predictions(
        base, None, data, settings=settings, output=str(output), reporter=notes, resume=resume
    )
    return notes.notes


@pytest.fixture
def data(tmp_path: Path) -> str:
    noted = [{**row, "note": {"kept": [1, 2.50]}} for row in rows(40)]
    return save_rows(tmp_path / "data.jsonl", noted)


def test_every_field_of_a_record_passes_through(base: Base, data: str, tmp_path: Path) -> None:
    write(base, data, tmp_path / "out.jsonl")
    before = [json.loads(line) for line in Path(data).read_text().splitlines()]
    after = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in after] == before
    assert all(isinstance(row["prediction"], str) for row in after)


def test_a_killed_run_goes_on_to_the_same_bytes(
    base: Base, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(base, data, tmp_path / "whole.jsonl")

    def broken(*arguments: Any, **named: Any) -> Iterator[Any]:
        for number, completed in enumerate(generate(*arguments, **named)):
            if number == 21:
                raise KeyboardInterrupt
            yield completed

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "generate", broken)
        with pytest.raises(KeyboardInterrupt):
            write(base, data, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    notes = write(base, data, tmp_path / "out.jsonl", resume=True)
    assert "going on after 16 records" in notes
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_a_prompt_beyond_the_context_is_named_and_can_be_cut(base: Base, tmp_path: Path) -> None:
    long = save_rows(
        tmp_path / "long.jsonl", [{"id": "a", "prompt": "word " * 60, "completion": ""}]
    )
    with pytest.raises(LorakitError, match=r"long.jsonl:1: the prompt's 301 tokens .*--truncate"):
        write(base, long, tmp_path / "out.jsonl")
    notes = write(base, long, tmp_path / "out.jsonl", truncate=True)
    assert notes == ["1 of 1 records were too long: --truncate cut 59.5 % of their tokens"]


def test_no_records_are_an_error_and_leave_no_file(base: Base, tmp_path: Path) -> None:
    empty = save_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(LorakitError, match="holds no records"):
        write(base, empty, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
