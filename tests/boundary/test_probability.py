from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import save_adapter
from lorakit.boundary import probability as module
from lorakit.boundary.probability import knee, read_probabilities
from lorakit.boundary.records import ProbabilityRecord
from lorakit.models.base import Base
from lorakit.models.lora import attach
from lorakit.records.record import Record
from lorakit.settings import BoundarySettings
from tests.support.boundary_models import SETTINGS, Notes, random_adapter
from tests.support.in_process import run_here
from tests.support.models import FAMILIES, LAYERS, open_base, save_model
from tests.support.training_data import rows, save_rows

COUNT, TOKENS = 6, 4


@pytest.fixture
def data(tmp_path: Path) -> str:
    return save_rows(tmp_path / "val.jsonl", rows(COUNT))


def look(base: Base, adapter: Adapter, data: str, **settings: Any) -> list[ProbabilityRecord]:
    chosen = BoundarySettings(**settings)
    return read_probabilities(
        base, adapter, data, settings=chosen, generation=SETTINGS, reporter=Notes()
    )


FINAL_NORM = {"phi": "final_layernorm", "gpt2": "ln_f"}


def by_hand(base: Base, family: str) -> list[list[list[float]]]:
    """Gold and largest probabilities by layer and position, one record at a time.

    From `output_hidden_states`, of which all but the last lack the final norm; the head, its bias
    and soft-capping written out.
    """
    model = base.model
    norm = getattr(model.get_decoder(), FINAL_NORM.get(family, "norm"))
    cap = getattr(model.config, "final_logit_softcapping", None)
    encoder = base.encoder(chat="off")
    gold: list[list[list[float]]] = [[[] for _ in range(TOKENS)] for _ in range(LAYERS)]
    most: list[list[list[float]]] = [[[] for _ in range(TOKENS)] for _ in range(LAYERS)]
    for row in rows(COUNT):
        example = encoder.example(Record(row, row["id"]))
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            for layer in range(1, LAYERS + 1):
                state = states[layer] if layer == LAYERS else norm(states[layer])
                logits = model.get_output_embeddings()(state)
                if cap:
                    logits = cap * torch.tanh(logits / cap)
                chances = logits[0].softmax(-1)
                for token in range(min(TOKENS, example.targets)):
                    place = example.start + token
                    gold[layer - 1][token].append(float(chances[place - 1, example.ids[place]]))
                    most[layer - 1][token].append(float(chances[place - 1].max()))
    return [[[sum(t) / len(t) for t in layer] for layer in table] for table in (gold, most)]


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_those_of_the_hidden_states(
    family: str, data: str, tmp_path: Path
) -> None:
    name = save_model(tmp_path / family, family)
    base = open_base(name)
    if family == "phi":
        torch.nn.init.normal_(base.model.lm_head.bias)
    adapter = random_adapter(base, size=0.3)
    curves = look(base, adapter, data)
    gold, most = by_hand(base, family)
    for row, expected, largest in zip(curves, gold, most, strict=True):
        assert row["probabilities"] == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert row["maximum_probabilities"] == pytest.approx(largest, rel=1e-3)
        assert row["score"] == pytest.approx(sum(expected) / TOKENS, rel=1e-3)
    assert [row["boundary"] for row in curves] == [1, 2, 3]
    assert sum(row["best"] for row in curves) == 1


def test_compared_curves_are_those_of_the_stripped_adapter(llama: str, data: str) -> None:
    adapter = random_adapter(open_base(llama))
    curves = look(open_base(llama), adapter, data, compare=(1, 2))
    for k in (1, 2):
        base = open_base(llama)
        alone = look(base, random_adapter(base, below=k), data)
        for row, stripped in zip(curves, alone, strict=True):
            curve = row["compared"][str(k)]
            assert curve["probabilities"] == pytest.approx(stripped["probabilities"])
            assert curve["maximum_probabilities"] == pytest.approx(
                stripped["maximum_probabilities"]
            )
            expected = torch.tensor(curve["probabilities"]) - torch.tensor(row["probabilities"])
            assert curve["differences"] == pytest.approx(expected.tolist(), abs=1e-7)


def test_completions_shorter_than_the_tokens_asked_for_count_where_they_reach(
    llama: str, tmp_path: Path
) -> None:
    short = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "bcdefg"}]
    data = save_rows(tmp_path / "short.jsonl", short)
    curves = look(open_base(llama), random_adapter(open_base(llama)), data, tokens=9)
    assert {len(row["probabilities"]) for row in curves} == {7}  # six letters and the end


def test_the_model_is_as_it_was_afterwards(llama: str, data: str) -> None:
    base = open_base(llama)
    adapter = random_adapter(base)
    ids = torch.tensor([[1, 5, 9]])
    look(base, adapter, data)
    after = base.model(input_ids=ids).logits
    fresh = open_base(llama)
    attach(fresh, adapter)
    assert torch.equal(after, fresh.model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ([0.0, 0.0, 0.0, 0.1, 0.9, 1.0], 3),
        ([0.1, 0.1, 0.1, 0.1, 0.9], 3),
        ([0.0, 0.9, 1.0], None),
        ([0.0, 1.0, 2.0, 3.0], None),
        ([0.5], None),
        ([1.0, 0.0, 0.0, 1.0], 1),
    ],
    ids=["convex", "late jump", "concave", "straight", "one", "equal"],
)
def test_the_knee_is_farthest_below_the_chord(values: list[float], place: int | None) -> None:
    assert knee(values) == place


def test_a_curve_without_a_knee_is_said_and_its_last_boundary_marked(
    llama: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, notes = open_base(llama), Notes()
    arguments: dict[str, Any] = {"settings": BoundarySettings(), "generation": SETTINGS}
    monkeypatch.setattr(module, "knee", lambda values: None)
    records = read_probabilities(base, random_adapter(base), data, reporter=notes, **arguments)
    assert [record["best"] for record in records] == [False, False, True]
    assert notes.notes == [
        "no knee: the curve is nowhere below its chord; boundary 3, the last, is marked as the best"
    ]


@pytest.mark.parametrize("more", [[], ["--compare", "1,2"]], ids=["alone", "compared"])
def test_the_command_draws_a_line_for_each_token(
    more: list[str], llama: str, data: str, tmp_path: Path
) -> None:
    path = save_adapter(random_adapter(open_base(llama)), str(tmp_path / "a.safetensors"))
    plot = tmp_path / "curve.png"
    done = run_here(
        *("find-boundary", path, "--data", data, "--by", "probability", "--tokens", "2"),
        *("--model", llama, "--plot", str(plot), *more),
    )
    assert done.code == 0, done.stderr
    curves = [json.loads(line) for line in done.text.splitlines()]
    assert [len(row["probabilities"]) for row in curves] == [2, 2, 2]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curve.png.jsonl").read_text() == done.text
