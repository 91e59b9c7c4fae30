from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import save_adapter
from lorakit.boundary import evaluate as module
from lorakit.boundary.decode import Pool, can_pool
from lorakit.boundary.evaluate import Evaluation, decode, draw_sample, evaluate
from lorakit.boundary.gates import Gates
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.lora import attach
from lorakit.models.tokens import Example
from lorakit.records import Record, load_records
from lorakit.scoring.metrics import METRICS, Score
from lorakit.scoring.systems import System, score_systems
from lorakit.settings import BoundarySettings
from tests.support.boundary_models import SETTINGS, Notes, alone, random_adapter
from tests.support.models import FAMILIES, LAYERS, open_base, save_model
from tests.support.program import run
from tests.support.training_data import rows, save_rows

EVERY = list(range(LAYERS + 1))


def records(count: int, seed: int = 0) -> list[Record]:
    return [Record(row, f"data:{row['id']}") for row in rows(count, seed)]


def prompts(base: Base, given: list[Record]) -> list[Example]:
    encoder = base.encoder(chat="off")
    return [encoder.prompt(record, SETTINGS.max_new_tokens) for record in given]


def naive(name: str, ends: tuple[int, ...], given: list[Record], **adapter: Any) -> list[list[str]]:
    """Return the outputs of every boundary, each on a model of its own."""
    found = []
    for k in EVERY:
        base = replace(open_base(name), end_tokens=ends)
        stripped = random_adapter(base, below=k, **adapter) if k else None
        found.append(alone(base, stripped, given, SETTINGS))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_boundary_writes_what_it_writes_alone(family: str, tmp_path: Path) -> None:
    name = save_model(tmp_path, family)
    base, given = open_base(name), records(9)
    frequent = [ord(letter) for letter in "aeiou"]
    ends = (*base.end_tokens, *frequent)  # so that outputs end at various lengths
    base = replace(base, end_tokens=ends)
    expected = naive(name, ends, given)
    assert len({tuple(texts) for texts in expected}) == len(EVERY), "boundaries do not differ"
    draw = random.Random(family)
    for batch_size in (1, draw.randrange(2, 4), draw.randrange(4, 10), 40):
        settings = replace(SETTINGS, batch_size=batch_size)
        adapter = random_adapter(base)
        found = decode(base, adapter, prompts(base, given), EVERY, settings, Notes())
        assert [found[k] for k in EVERY] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_decoded_together(family: str, tmp_path: Path) -> None:
    base = open_base(save_model(tmp_path, family))
    with Gates(attach(base, random_adapter(base))).standing() as gates:
        assert can_pool(base, gates, prompts(base, records(1))[0].ids)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_shorter_than_the_prompt_is_kept(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FAMILIES[family]

    def narrow() -> Any:
        config = made()
        config.sliding_window = 8
        return config

    monkeypatch.setitem(FAMILIES, family, narrow)
    name = save_model(tmp_path, family)
    base, given = open_base(name), records(6)
    found = decode(base, random_adapter(base), prompts(base, given), EVERY, SETTINGS, Notes())
    assert [found[k] for k in EVERY] == naive(name, base.end_tokens, given)


def test_a_model_that_cannot_be_pooled_is_decoded_a_boundary_at_a_time(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, given = open_base(llama), records(5)
    monkeypatch.setattr(module, "can_pool", lambda *arguments: False)
    monkeypatch.delattr(Pool, "run")
    notes = Notes()
    found = decode(base, random_adapter(base), prompts(base, given), EVERY, SETTINGS, notes)
    assert [found[k] for k in EVERY] == naive(llama, base.end_tokens, given)
    assert notes.notes == [f"{llama} cannot decode boundaries together: one after the other"]


def test_boundaries_with_the_same_layers_on_are_decoded_once(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, given, asked = open_base(llama), records(5), []
    whole = Pool.run

    def counted(self: Pool, boundaries: Any) -> Any:
        asked.extend(boundaries)
        return whole(self, boundaries)

    monkeypatch.setattr(Pool, "run", counted)
    adapter = random_adapter(base, layers=[1])
    found = decode(base, adapter, prompts(base, given), EVERY, SETTINGS, Notes())
    assert sorted(asked) == [0, 2]
    assert found[0] == found[1] != found[2] == found[3]
    assert [found[k] for k in EVERY] == naive(llama, base.end_tokens, given, layers=[1])


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_every_projection_of_a_layer_can_have_lora(family: str, tmp_path: Path) -> None:
    name = save_model(tmp_path, family)
    base, given = open_base(name), records(5)
    told: dict[str, Any] = {"targets": ["all-linear"], "size": 0.5}
    adapter = random_adapter(base, **told)
    found = decode(base, adapter, prompts(base, given), EVERY, SETTINGS, Notes())
    assert [found[k] for k in EVERY] == naive(name, base.end_tokens, given, **told)


def test_no_more_rows_than_the_batch_size_go_through_a_layer(llama: str) -> None:
    base, seen = open_base(llama), set()
    for layer in base.model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.add(len(output)))
    settings = replace(SETTINGS, batch_size=3)
    given = prompts(base, records(7))
    texts = decode(base, random_adapter(base), given, EVERY, settings, Notes())
    assert len(texts) == len(EVERY)
    assert max(seen) == 3


def test_the_model_is_as_it_was_afterwards(llama: str) -> None:
    base, given = open_base(llama), records(4)
    adapter = random_adapter(base)
    decode(base, adapter, prompts(base, given), EVERY, SETTINGS, Notes())
    after = [r.prediction for r, _ in boundary_outputs(base, given)]
    assert after == alone(open_base(llama), adapter, given, SETTINGS)


def boundary_outputs(base: Base, given: list[Record]) -> Any:
    from lorakit.models.generation import generate

    return generate(base, base.encoder(chat="off"), given, SETTINGS)


# — scores and records —


@pytest.fixture
def data(tmp_path: Path) -> str:
    return save_rows(tmp_path / "val.jsonl", rows(12))


@pytest.fixture
def adapter(llama: str) -> Adapter:
    made: Adapter = random_adapter(open_base(llama))
    return made


def look(base: Base, adapter: Adapter, data: str, notes: Notes | None = None, **more: Any) -> Any:
    settings = {"settings": BoundarySettings(sample=8), "generation": SETTINGS, **more}
    return evaluate(base, adapter, data, reporter=notes or Notes(), **settings)


def test_scores_are_those_that_score_gives_the_predictions(
    llama: str, adapter: Adapter, data: str, tmp_path: Path
) -> None:
    output = tmp_path / "predictions.jsonl"
    settings = BoundarySettings(sample=8, metric="chrf")
    found = look(
        open_base(llama), adapter, data, settings=settings, predictions=str(output)
    ).as_records()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 8 * len(EVERY)
    for row in found:
        part = [line for line in lines if line["boundary"] == row["boundary"]]
        path = save_rows(tmp_path / "part.jsonl", part)
        ((one,),) = (found.scores for found in score_systems([System((path,))], metrics=["chrf"]))
        assert (row["score"], row["signature"], row["count"]) == (one.value, one.signature, 8)
    assert [row["boundary"] for row in found] == [1, 2, 3]
    assert sum(row["best"] for row in found) == 1


def values(*given: float, metric: str = "rougeL") -> Evaluation:
    return Evaluation([], {}, {k: Score(metric, v, 1, "") for k, v in enumerate(given)})


def test_the_best_of_equal_boundaries_is_the_smaller_and_never_the_base() -> None:
    assert values(9.0, 1.0, 3.0, 3.0).best == 2
    assert values(0.0, 0.0, 0.0).best == 1


def test_where_lower_is_better_the_lowest_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "wer", replace(METRICS["em"], higher_is_better=False))
    found = values(0.0, 2.0, 1.0, metric="wer")
    assert found.best == 2
    assert "does not help" in found.baseline_note


def test_a_base_that_wins_is_said() -> None:
    assert values(3.0, 1.0, 2.0).baseline_note.endswith("(2.00): the adapter does not help")
    assert values(1.0, 1.0, 2.0).baseline_note.endswith(
        "scores 1.00 rougeL, boundary 2 scores 2.00"
    )


def test_a_sample_is_drawn_by_its_seed_and_kept_in_order(data: str) -> None:
    whole = [record.id for record in load_records(data)[0]]
    drawn = [[r.id for r in draw_sample(data, sample=5, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == [one for one in whole if one in drawn[0]]
    assert [r.id for r in draw_sample(data, sample=99, seed=0)] == whole


def test_only_the_boundaries_asked_for_are_tried(llama: str, adapter: Adapter, data: str) -> None:
    found = look(open_base(llama), adapter, data, settings=BoundarySettings(boundaries=(2, 3)))
    assert [row["boundary"] for row in found.as_records()] == [2, 3]
    with pytest.raises(LorakitError, match="no boundary 4; give boundaries within 1-3"):
        look(open_base(llama), adapter, data, settings=BoundarySettings(boundaries=(2, 4)))


def test_a_prompt_that_is_too_long_is_an_error_as_in_generate(
    llama: str, adapter: Adapter, tmp_path: Path
) -> None:
    row = {"prompt": "word " * 60, "completion": "x"}
    long = save_rows(tmp_path / "long.jsonl", [row, {**row, "prompt": "short"}])
    with pytest.raises(LorakitError, match=r"long.jsonl:1: the prompt's 301 tokens .*--truncate"):
        look(open_base(llama), adapter, long)
    notes = Notes()
    look(open_base(llama), adapter, long, notes, generation=replace(SETTINGS, truncate=True))
    assert notes.notes[0].startswith("1 of 2 records were too long")


def test_records_without_anything_to_compare_with_are_refused(
    llama: str, adapter: Adapter, tmp_path: Path
) -> None:
    path = save_rows(tmp_path / "bare.jsonl", [{"prompt": "a"}])
    with pytest.raises(LorakitError, match=r"bare.jsonl:1: .*neither 'references' nor"):
        look(open_base(llama), adapter, path)


def test_in_half_precision_the_share_that_differs_is_measured(
    llama: str, adapter: Adapter, data: str
) -> None:
    notes = Notes()
    look(open_base(llama, torch.bfloat16), adapter, data, notes)
    (told,) = [note for note in notes.notes if "bfloat16" in note]
    assert "of 32 outputs differ" in told


# — the command —


def test_the_command_reads_an_adapter_from_a_pipe_and_marks_one_best(
    llama: str, adapter: Adapter, data: str, tmp_path: Path
) -> None:
    path = save_adapter(adapter, str(tmp_path / "a.safetensors"))
    plot = tmp_path / "curve.svg"
    command = ["find-boundary", "--data", data, "--model", llama, "--max-new-tokens", "5"]
    with open(path, "rb") as stream:
        done = run(*command, "--plot", str(plot), stdin=stream.fileno())
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["boundary"] for row in found] == [1, 2, 3]
    assert sum(row["best"] for row in found) == 1
    assert "decoding: 48 of 48, 0 s left" in done.stderr
    assert "Note: baseline: the base model (boundary 0) scores" in done.stderr
    assert plot.read_text().startswith("<?xml")
    assert (tmp_path / "curve.svg.jsonl").read_text() == done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a", "--data", "x", "--boundaries", "0-3"], "boundaries begin at 1"),
        (["a", "--data", "x", "--compare", "2"], "--compare is for --by probability only"),
        (["a", "--data", "x", "--by", "probability", "--predictions", "p"], "evaluation only"),
        (["--data", "-"], "Only one input can be '-'"),
    ],
)
def test_bad_usage_is_told(arguments: list[str], reason: str) -> None:
    done = run("find-boundary", *arguments)
    assert done.returncode == 2
    assert reason in done.stderr
