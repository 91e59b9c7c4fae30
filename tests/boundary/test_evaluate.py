from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.names import layer_of
from lorakit.adapters.storage import save_adapter
from lorakit.boundary import decode as decode_module
from lorakit.boundary import evaluate as module
from lorakit.boundary.cuts import Cut, Point, bottom, cut_at, layer_order
from lorakit.boundary.decode import Fan, Pool, can_pool, fans_that_hold
from lorakit.boundary.evaluate import decode, draw_sample, evaluate
from lorakit.boundary.gates import Gates
from lorakit.boundary.strip import strip_layers
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.lora import attach
from lorakit.models.reading import Reader
from lorakit.models.tokens import Example
from lorakit.records.jsonl import load_records
from lorakit.records.record import Record
from lorakit.runs.resume import nothing_saved
from lorakit.scoring.systems import System, score_systems
from lorakit.settings import BoundarySettings
from tests.support.boundary_models import SETTINGS, Notes, alone, random_adapter
from tests.support.models import FAMILIES, LAYERS, open_base, save_model
from tests.support.program import run
from tests.support.training_data import rows, save_rows

EVERY = list(range(LAYERS + 1))
CUTS = {k: bottom(k, LAYERS) for k in EVERY}


def records(count: int, seed: int = 0, before: str = "") -> list[Record]:
    return [
        Record({**row, "prompt": before + row["prompt"]}, f"data:{row['id']}")
        for row in rows(count, seed)
    ]


def prompts(base: Base, sample: list[Record]) -> list[Example]:
    encoder = base.encoder(chat="off")
    return [encoder.prompt(record, SETTINGS.max_new_tokens) for record in sample]


def naive(
    name: str, ends: tuple[int, ...], sample: list[Record], **adapter: Any
) -> list[list[str]]:
    """Return the outputs of every boundary, each on a model of its own."""
    outputs = []
    for k in EVERY:
        base = replace(open_base(name), end_tokens=ends)
        stripped = random_adapter(base, below=k, **adapter) if k else None
        outputs.append(alone(base, stripped, sample, SETTINGS))
    return outputs


@pytest.mark.parametrize("before", ["", "All prompts begin so. "])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_boundary_writes_what_it_writes_alone(
    family: str, before: str, tmp_path: Path
) -> None:
    name = save_model(tmp_path, family)
    base, sample = open_base(name), records(9, before=before)
    frequent = [ord(letter) for letter in "aeiou"]
    ends = (*base.end_tokens, *frequent)  # so that outputs end at various lengths
    base = replace(base, end_tokens=ends)
    expected = naive(name, ends, sample)
    assert len({tuple(texts) for texts in expected}) == len(EVERY), "boundaries do not differ"
    draw = random.Random(family)
    for batch_size in (1, draw.randrange(2, 4), draw.randrange(4, 10), 40):
        settings = replace(SETTINGS, batch_size=batch_size)
        adapter = random_adapter(base)
        outputs = decode(base, adapter, prompts(base, sample), CUTS, settings, Notes())
        assert [outputs[k] for k in EVERY] == expected


@pytest.mark.parametrize("holding", [0, 1, 2])
@pytest.mark.parametrize("fanned", [1, 2, 4])
def test_fans_without_room_for_a_prefix_read_it_with_every_prompt(
    fanned: int, holding: int, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fans = []

    def first_ones(cuts: Sequence[Cut], size: int, share: float) -> dict[Fan, int]:
        every = fans_that_hold(cuts, size, share)
        fans.append(len(every))
        return dict(list(every.items())[:holding])

    monkeypatch.setattr(decode_module, "FANNED", fanned)
    monkeypatch.setattr(decode_module, "fans_that_hold", first_ones)
    base, sample = open_base(llama), records(6, before="All prompts begin so. ")
    settings = replace(SETTINGS, batch_size=4)
    outputs = decode(base, random_adapter(base), prompts(base, sample), CUTS, settings, Notes())
    assert [outputs[k] for k in EVERY] == naive(llama, base.end_tokens, sample)
    assert fans == [1 + -(-LAYERS // fanned)]


def test_fans_hold_a_prefix_while_it_takes_no_more_than_the_batch() -> None:
    cuts = list(CUTS.values())
    highest, *others = (CUTS[k] for k in reversed(EVERY))
    assert LAYERS == 3
    fan = (others[0], others[2], others[1])  # 2, then 0 and 1
    rows = 3 + 3 + 2
    assert fans_that_hold(cuts, 4, 0.5) == {(highest,): 3, fan: rows}
    assert fans_that_hold(cuts, 3, 0.81) == {(highest,): 3, fan: rows}  # 9 / 0.81 > 3 + rows
    assert fans_that_hold(cuts, 3, 0.82) == {(highest,): 3}
    assert fans_that_hold(cuts, 4, 0.0) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_decoded_together(family: str, tmp_path: Path) -> None:
    base = open_base(save_model(tmp_path, family))
    with Gates(attach(base, random_adapter(base))).standing() as gates:
        assert can_pool(base, gates, prompts(base, records(1))[0].ids)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_shorter_than_the_prompt_is_kept(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of = FAMILIES[family]

    def narrow() -> Any:
        config = config_of()
        config.sliding_window = 8
        return config

    monkeypatch.setitem(FAMILIES, family, narrow)
    name = save_model(tmp_path, family)
    base, sample = open_base(name), records(6, before="All prompts begin so. ")
    outputs = decode(base, random_adapter(base), prompts(base, sample), CUTS, SETTINGS, Notes())
    assert [outputs[k] for k in EVERY] == naive(name, base.end_tokens, sample)


def test_frequencies_that_change_with_the_length_are_decoded_a_boundary_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of = FAMILIES["llama"]

    def stretched() -> Any:
        config = config_of()
        factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 1e4}
        config.rope_parameters = {"rope_type": "longrope", **factors}
        config.rope_parameters["original_max_position_embeddings"] = 20
        return config

    monkeypatch.setitem(FAMILIES, "llama", stretched)
    monkeypatch.delattr(Pool, "run")
    name = save_model(tmp_path)
    base, sample = open_base(name), records(3)
    settings = replace(SETTINGS, batch_size=1)
    outputs = decode(base, random_adapter(base), prompts(base, sample), CUTS, settings, Notes())
    assert set(outputs) == set(CUTS)


def test_a_model_that_cannot_be_pooled_is_decoded_a_boundary_at_a_time(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sample = open_base(llama), records(5)
    monkeypatch.setattr(module, "can_pool", lambda *arguments: False)
    monkeypatch.delattr(Pool, "run")
    notes = Notes()
    outputs = decode(base, random_adapter(base), prompts(base, sample), CUTS, SETTINGS, notes)
    assert [outputs[k] for k in EVERY] == naive(llama, base.end_tokens, sample)
    assert notes.notes == [f"{llama} cannot decode boundaries together: one after the other"]


def test_boundaries_with_the_same_layers_on_are_decoded_once(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sample = open_base(llama), records(5)
    asked: list[tuple[float, ...]] = []
    whole = Pool.run

    def counted(self: Pool, cuts: Any, done: Any) -> Any:
        asked.extend(cut.factors for cut in cuts)
        return whole(self, cuts, done)

    monkeypatch.setattr(Pool, "run", counted)
    adapter = random_adapter(base, layers=[1])
    outputs = decode(base, adapter, prompts(base, sample), CUTS, SETTINGS, Notes())
    assert sorted(asked) == [(0.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
    assert outputs[0] == outputs[1] != outputs[2] == outputs[3]
    assert [outputs[k] for k in EVERY] == naive(llama, base.end_tokens, sample, layers=[1])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_outputs_that_are_saved_already_change_none(llama: str, share: float) -> None:
    base, sample = open_base(llama), records(5)
    adapter, saved = random_adapter(base), nothing_saved()
    whole = decode(base, adapter, prompts(base, sample), CUTS, SETTINGS, Notes(), saved)
    count = len(saved.values)
    assert count == len(CUTS) * len(sample)
    for name in random.Random(share).sample(sorted(saved.values), count - int(share * count)):
        del saved.values[name]
    assert decode(base, adapter, prompts(base, sample), CUTS, SETTINGS, Notes(), saved) == whole
    assert len(saved.values) == count


@pytest.mark.parametrize("keep", ["top", "random"])
def test_other_layers_than_the_bottom_ones_write_what_they_write_alone(
    llama: str, keep: str
) -> None:
    base, sample = open_base(llama), records(6)
    order = layer_order(keep, LAYERS, seed=3)
    cuts = {k: cut_at(Point(k), order) for k in EVERY}
    for batch_size in (1, 3, 16):
        settings = replace(SETTINGS, batch_size=batch_size)
        adapter = random_adapter(base)
        outputs = decode(base, adapter, prompts(base, sample), cuts, settings, Notes())
        for k in EVERY[1:]:
            stripped = strip_layers(random_adapter(base), keep=order[:k])
            assert outputs[k] == alone(open_base(llama), stripped, sample, SETTINGS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_factor_writes_what_the_adapter_with_scaled_upper_b_writes(
    family: str, tmp_path: Path
) -> None:
    name = save_model(tmp_path, family)
    base, sample = open_base(name), records(6)
    points = [Point(k, factor) for k in EVERY[1:] for factor in (0.0, 0.25, 0.5)]
    cuts = {point: cut_at(point, range(LAYERS)) for point in points}
    adapter = random_adapter(base)
    outputs = decode(base, adapter, prompts(base, sample), cuts, SETTINGS, Notes())
    assert len({tuple(texts) for texts in outputs.values()}) > len(EVERY)
    for point in points:
        factors = {
            m.name: (m.a, m.b * cuts[point].left_in(layer_of(m.name))) for m in adapter.modules()
        }
        scaled = Adapter(tensors_of(factors), adapter.config)
        assert outputs[point] == alone(open_base(name), scaled, sample, SETTINGS)


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_every_projection_of_a_layer_can_have_lora(family: str, tmp_path: Path) -> None:
    name = save_model(tmp_path, family)
    base, sample = open_base(name), records(5)
    shape: dict[str, Any] = {"targets": ["all-linear"], "size": 0.5}
    adapter = random_adapter(base, **shape)
    outputs = decode(base, adapter, prompts(base, sample), CUTS, SETTINGS, Notes())
    assert [outputs[k] for k in EVERY] == naive(name, base.end_tokens, sample, **shape)


def test_no_more_rows_than_the_batch_size_go_through_a_layer(llama: str) -> None:
    base, seen = open_base(llama), set()
    for layer in base.model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.add(len(output)))
    settings = replace(SETTINGS, batch_size=3)
    sample = prompts(base, records(7))
    texts = decode(base, random_adapter(base), sample, CUTS, settings, Notes())
    assert len(texts) == len(EVERY)
    assert max(seen) == 3


def test_what_all_prompts_begin_with_is_read_once_for_each_fan(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sample = open_base(llama), records(7, before="All prompts begin so. ")
    lengths: list[int] = []
    fan_out = Reader.fan_out

    def noting(self: Reader, tokens: Any, *others: Any) -> list[list[int]]:
        lengths.append(len(tokens))
        return fan_out(self, tokens, *others)

    own = [list(prompt.ids) for prompt in prompts(base, sample)]
    begins = next(n for n, column in enumerate(zip(*own, strict=False)) if len(set(column)) > 1)
    monkeypatch.setattr(Reader, "fan_out", noting)
    with Gates(attach(base, random_adapter(base))).standing() as gates:
        pool = Pool(base, gates, own, SETTINGS.max_new_tokens, batch_size=2)
        list(pool.run(list(CUTS.values())))
    fans = -(-LAYERS // 2)  # of two of the cuts below the highest
    assert len(lengths) == 1 + fans + fans * len(own)
    assert lengths.count(begins) >= 1 + fans
    longest = max(map(len, own)) + SETTINGS.max_new_tokens - begins
    assert all(length <= longest for length in lengths if length != begins)


def test_the_model_is_as_it_was_afterwards(llama: str) -> None:
    base, sample = open_base(llama), records(4)
    adapter = random_adapter(base)
    decode(base, adapter, prompts(base, sample), CUTS, SETTINGS, Notes())
    after = [r.prediction for r, _ in boundary_outputs(base, sample)]
    assert after == alone(open_base(llama), adapter, sample, SETTINGS)


def boundary_outputs(base: Base, sample: list[Record]) -> Any:
    from lorakit.models.generation import generate

    return generate(base, base.encoder(chat="off"), sample, SETTINGS)


# — scores and records —


@pytest.fixture
def data(tmp_path: Path) -> str:
    return save_rows(tmp_path / "val.jsonl", rows(12))


@pytest.fixture
def adapter(llama: str) -> Adapter:
    adapter: Adapter = random_adapter(open_base(llama))
    return adapter


def look(base: Base, adapter: Adapter, data: str, notes: Notes | None = None, **more: Any) -> Any:
    settings = {"settings": BoundarySettings(sample=8), "generation": SETTINGS, **more}
    return evaluate(base, adapter, data, reporter=notes or Notes(), **settings)


def test_scores_are_those_that_score_gives_the_predictions(
    llama: str, adapter: Adapter, data: str, tmp_path: Path
) -> None:
    output = tmp_path / "predictions.jsonl"
    settings = BoundarySettings(sample=8, metric="chrf")
    evaluation = look(open_base(llama), adapter, data, settings=settings, predictions=str(output))
    scored = evaluation.as_records()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 8 * len(EVERY)
    for row in scored:
        part = [line for line in lines if line["boundary"] == row["boundary"]]
        path = save_rows(tmp_path / "part.jsonl", part)
        ((score,),) = (
            system.scores for system in score_systems([System((path,))], metrics=["chrf"])
        )
        assert (row["score"], row["signature"], row["count"]) == (score.value, score.signature, 8)
    assert [row["boundary"] for row in scored] == [1, 2, 3]
    assert sum(row["best"] for row in scored) == 1


def test_a_sample_is_drawn_by_its_seed_and_kept_in_order(data: str) -> None:
    whole = [record.id for record in load_records(data)[0]]
    drawn = [[r.id for r in draw_sample(data, sample=5, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == [name for name in whole if name in drawn[0]]
    assert [r.id for r in draw_sample(data, sample=99, seed=0)] == whole


def test_only_the_boundaries_asked_for_are_tried(llama: str, adapter: Adapter, data: str) -> None:
    evaluation = look(open_base(llama), adapter, data, settings=BoundarySettings(boundaries=(2, 3)))
    assert [row["boundary"] for row in evaluation.as_records()] == [2, 3]
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
    (note,) = [note for note in notes.notes if "bfloat16" in note]
    assert "of 32 outputs differ" in note


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
    scored = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["boundary"] for row in scored] == [1, 2, 3]
    assert sum(row["best"] for row in scored) == 1
    assert "decoding: 48 of 48, 0 s left" in done.stderr
    assert "Note: baseline: the base model (boundary 0) scores" in done.stderr
    assert plot.read_text().startswith("<?xml")
    assert (tmp_path / "curve.svg.jsonl").read_text() == done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["a", "--data", "x", "--boundaries", "0-3"], "boundaries begin at 1"),
        (["a", "--data", "x", "--by", "probability", "--metric", "loss"], "evaluation only"),
        (["a", "--data", "x", "--by", "probability", "--rule", "1se"], "evaluation only"),
        (["a", "--data", "x", "--by", "probability", "--keep", "top"], "evaluation only"),
        (["a", "--data", "x", "--by", "probability", "--factors", "0,0.5"], "evaluation only"),
        (["a", "--data", "x", "--metric", "loss", "--predictions", "p"], "decodes nothing"),
        (["a", "--data", "x", "--keep", "top", "--factors", "0.5"], "no other --keep"),
        (["a", "--data", "x", "--factors", "0,1.5"], "1.5 is not in 0 ≤ factor ≤ 1"),
        (["a", "--data", "x", "--compare", "2"], "--compare is for --by probability only"),
        (["a", "--data", "x", "--by", "probability", "--predictions", "p"], "evaluation only"),
        (["--data", "-"], "Only one input can be '-'"),
    ],
)
def test_bad_usage_is_refused(arguments: list[str], reason: str) -> None:
    done = run("find-boundary", *arguments)
    assert done.returncode == 2
    assert reason in done.stderr
