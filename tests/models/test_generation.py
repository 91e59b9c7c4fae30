from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.errors import LorakitError
from lorakit.models import predictions
from lorakit.models.base import Base
from lorakit.models.completions import completion_of
from lorakit.models.generation import complete, generate, window_size
from lorakit.models.predictions import write_predictions, write_predictions_of_each
from lorakit.models.sharing import ALONE, Team
from lorakit.records.completions import CLOSE, OPEN, until_stop
from lorakit.records.few_shot import FewShot
from lorakit.records.record import Record
from lorakit.reporting import Silent
from lorakit.settings import GenerationSettings
from tests.support.boundary_models import random_adapter
from tests.support.models import open_base
from tests.support.teams import run_as_team
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


def test_a_completion_ends_before_a_stop_text_whatever_the_batch(base: Base) -> None:
    """Against the whole completion, cut as text: greedy decoding is the same up to there."""
    sample = records(12)
    whole = predict(base, sample, max_new_tokens=30)
    letters = sorted({text[len(text) // 2] for text in whole if text})[:3]
    stop = (whole[0][3:6], *letters)
    cut = [until_stop(text, stop).strip() for text in whole]
    assert cut != whole
    for batch_size in (1, 4):
        assert predict(base, sample, max_new_tokens=30, stop=stop, batch_size=batch_size) == cut


def test_decoding_ends_where_the_stop_text_is_complete(base: Base) -> None:
    prompt = base.encoder(chat="off").prompt(records(1)[0], 6).ids
    settings = replace(SETTINGS, max_new_tokens=40)
    (whole,) = complete(base, [prompt], settings)
    pieces = [completion_of(base, whole[: n + 1]).prediction for n in range(len(whole))]
    stop = pieces[20][-4:]
    first = next(n for n, text in enumerate(pieces) if stop in text)
    assert complete(base, [prompt], replace(settings, stop=(stop,))) == [whole[: first + 1]]


def test_a_stop_text_inside_reasoning_ends_nothing(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = base.encoder(chat="off").prompt(records(1)[0], 6).ids
    settings = replace(SETTINGS, max_new_tokens=20)
    (whole,) = complete(base, [prompt], settings)
    letter = completion_of(base, whole).prediction[5]
    monkeypatch.setattr(base.tokenizer, "chat_template", f"{OPEN}{CLOSE}")
    stopping = replace(settings, stop=(letter,))
    assert complete(base, [prompt], stopping, [True]) == [whole]
    assert len(complete(base, [prompt], stopping, [False])[0]) < len(whole)


def test_the_most_probable_of_one_token_is_the_greedy_one(base: Base) -> None:
    sample = records(6)
    assert predict(base, sample, temperature=2.0, top_k=1) == predict(base, sample)
    assert predict(base, sample, temperature=2.0, top_k=50) != predict(base, sample)


def test_samples_differ_and_repeat_with_their_seed(base: Base) -> None:
    settings = replace(SETTINGS, temperature=1.5, samples=3, batch_size=2)

    def fields(seed: int) -> list[Any]:
        seeded = replace(settings, seed=seed)
        completed = generate(base, base.encoder(chat="off"), records(5), seeded)
        return [record.fields for record, _ in completed]

    first = fields(0)
    assert first == fields(0) != fields(1)
    assert [row["id"] for row in first] == [row["id"] for row in rows(5)]
    for row in first:
        assert row["prediction"] == row["predictions"][0]
        assert len(set(row["predictions"])) == 3
        assert "reasonings" not in row


def test_examples_change_what_is_read_and_nothing_of_the_record(base: Base) -> None:
    examples = FewShot((Record(rows(1, seed=9)[0], "shots:1"),))
    encoder, sample = base.encoder(chat="off"), records(4)
    completed = list(generate(base, encoder, sample, SETTINGS, few_shot=examples))
    shown = [
        Record({**r.fields, "prompt": f"{e.prompt}{e.completion}\n\n{r.prompt}"}, r.where)
        for r in sample
        for e in (examples.before(r) or (Record({"prompt": "", "completion": ""}, ""),))
    ]
    assert sum(len(examples.before(record)) for record in sample) == 3  # one has the same id
    assert [r.prediction for r, _ in completed][1:] == predict(base, shown)[1:]
    assert [r.fields["prompt"] for r, _ in completed] == [r.prompt for r in sample]


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


def test_a_killed_run_of_samples_goes_on_to_the_same_bytes(
    base: Base, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "samples": 2, "max_new_tokens": 3}
    write(base, data, tmp_path / "whole.jsonl", **sampling)

    def broken(*arguments: Any, **named: Any) -> Iterator[Any]:
        yield from itertools.islice(generate(*arguments, **named), 20)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "generate", broken)
        with pytest.raises(KeyboardInterrupt):
            write(base, data, tmp_path / "out.jsonl", **sampling)
    assert "going on after 16 records" in write(
        base, data, tmp_path / "out.jsonl", resume=True, **sampling
    )
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# — several adapters —


@pytest.fixture(scope="module")
def adapters(llama: str, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Two random adapters that were saved."""
    folder = tmp_path_factory.mktemp("adapters")
    base = open_base(llama)
    paths = (
        save_adapter(random_adapter(base, seed=seed), str(folder / f"{seed}.safetensors"))
        for seed in (1, 2)
    )
    return [load_adapter(path) for path in paths]


def write_each(
    base: Base,
    adapters: list[Adapter],
    data: str,
    folder: Path,
    resume: bool = False,
    team: Team = ALONE,
) -> list[str]:
    notes = Notes()
    write_predictions_of_each(
        base,
        adapters,
        data,
        settings=replace(SETTINGS, batch_size=1),
        outputs=[str(folder / f"{number}.jsonl") for number in range(len(adapters))],
        reporter=notes,
        resume=resume,
        team=team,
    )
    return notes.notes


def test_several_adapters_write_what_each_writes_alone(
    llama: str, adapters: list[Adapter], data: str, tmp_path: Path
) -> None:
    write_each(open_base(llama), adapters, data, tmp_path)
    settings = replace(SETTINGS, batch_size=1)
    outputs = [(tmp_path / f"{number}.jsonl").read_bytes() for number in (0, 1)]
    assert outputs[0] != outputs[1]
    for adapter, output in zip(adapters, outputs, strict=True):
        alone = str(tmp_path / "alone.jsonl")
        write_predictions(
            open_base(llama), adapter, data, settings=settings, output=alone, reporter=Silent()
        )
        assert Path(alone).read_bytes() == output
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_two_processes_write_and_resume_the_files_of_one(
    llama: str, adapters: list[Adapter], data: str, tmp_path: Path
) -> None:
    def work(team: Team, name: str, resume: bool = False) -> list[str]:
        folder = tmp_path / (name if team.is_first else "another")
        folder.mkdir(exist_ok=True)
        return write_each(open_base(llama), adapters, data, folder, resume, team)

    def written(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    run_as_team(1, lambda team: work(team, "one"))
    run_as_team(2, lambda team: work(team, "two"))
    assert written("one") == written("two")
    assert written("another") == {}
    with pytest.MonkeyPatch.context() as patch:  # killed between the two
        patch.setattr(predictions, "_write_mark", interrupting_after(predictions._write_mark))
        with pytest.raises(LorakitError, match="the run ends here"):
            run_as_team(1, lambda team: work(team, "broken"))
    assert written("broken").keys() != written("one").keys()
    notes, _ = run_as_team(2, lambda team: work(team, "broken", resume=True))
    assert notes == [f"{tmp_path / 'broken' / '0.jsonl'} is done already"]
    assert written("broken") == written("one")


def interrupting_after(function: Callable[[Path], None]) -> Callable[[Path], None]:
    def call(mark: Path) -> None:
        function(mark)
        raise LorakitError("the run ends here")

    return call


def test_a_resumed_run_of_several_adapters_passes_over_those_that_are_done(
    llama: str, adapters: list[Adapter], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_base(llama)
    (tmp_path / "whole").mkdir()
    write_each(base, adapters, data, tmp_path / "whole")
    runs = 0

    def broken(*arguments: Any, **named: Any) -> Iterator[Any]:
        nonlocal runs
        runs += 1
        yield from itertools.islice(generate(*arguments, **named), None if runs == 1 else 18)
        if runs == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "generate", broken)
        with pytest.raises(KeyboardInterrupt):
            write_each(base, adapters, data, tmp_path)
    notes = write_each(base, adapters, data, tmp_path, resume=True)
    assert notes == [f"{tmp_path / '0.jsonl'} is done already", "going on after 16 records"]
    for name in ("0.jsonl", "1.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


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
