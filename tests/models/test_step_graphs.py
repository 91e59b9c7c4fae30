"""Recorded steps: on the CPU computed as always, on a GPU replayed (`pytest -m gpu`)."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.boundary.cuts import bottom
from lorakit.boundary.decode import Pool
from lorakit.boundary.gates import Gates
from lorakit.models.generation import complete
from lorakit.models.greedy import complete_greedily
from lorakit.models.loading import load_base
from lorakit.models.lora import attach
from lorakit.models.reading import Reader
from lorakit.models.step_graphs import StepGraphs
from lorakit.settings import GenerationSettings
from tests.benchmarks.shapes import random_adapter
from tests.support.devices import DEVICES, here
from tests.support.models import FAMILIES, save_model

SETTINGS = GenerationSettings(max_new_tokens=24)
PROMPTS = [list(range(3, 3 + length)) for length in (4, 9, 6, 12, 5, 7, 8)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return here(request.param)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many shapes are recorded after each step."""
    counts = []
    call = StepGraphs.__call__

    def counting(self: StepGraphs, *arguments: Any) -> Any:
        outputs = call(self, *arguments)
        counts.append(self.count)
        return outputs

    monkeypatch.setattr(StepGraphs, "__call__", counting)
    return counts


def test_every_call_returns_what_the_function_returns(device: torch.device) -> None:
    graphs = StepGraphs(torch.nn.Identity(), device)
    for key in (1, 2, 1, 1, 1, 2):
        read = torch.arange(key, key + 3)
        doubled, total = graphs(key, read, lambda place: (place * 2, place.sum()))
        assert (doubled.tolist(), int(total)) == ((2 * read).tolist(), int(read.sum()))
    assert graphs.count == (1 if device.type == "cuda" else 0)


def test_what_cannot_be_recorded_is_computed(device: torch.device) -> None:
    graphs = StepGraphs(torch.nn.Identity(), device)

    def waiting(place: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.tensor(place.tolist()),)

    outputs = [graphs(0, torch.tensor([value]), waiting)[0].item() for value in range(5)]
    assert outputs == list(range(5))
    assert graphs.count == 0
    assert torch.rand(1, device=device).isfinite()
    if device.type == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_what_rows_hold_is_freed_with_its_reader(llama: str, device: torch.device) -> None:
    base = load_base(llama, device=device, dtype=torch.float32)
    reader = Reader(base.model, 2, 8, records=True)
    reader.extend([[3, 4]], [0], 0, 1)
    reader.step([[5]], [2])
    seen = weakref.ref(reader), weakref.ref(reader.cache)
    gc.disable()
    try:
        del reader
        assert [one() for one in seen] == [None, None]
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_write_what_transformers_own_loop_writes(
    family: str, tmp_path: Path, recordings: list[int]
) -> None:
    base = load_base(save_model(tmp_path, family), device=here("cuda"), dtype=torch.float32)
    expected = complete(base, PROMPTS, SETTINGS)
    assert complete_greedily(base, PROMPTS, SETTINGS, at_once=4) == expected
    assert max(recordings) > 0


def test_padded_steps_of_a_search_write_what_others_write(
    llama: str, device: torch.device, recordings: list[int]
) -> None:
    base = load_base(llama, device=device, dtype=torch.float32)
    base.model.set_attn_implementation("sdpa")
    cuts = [bottom(layer, base.layers) for layer in range(base.layers + 1)]
    outputs = []
    with Gates(attach(base, random_adapter(base, strength=0.5))).standing() as gates:
        for records in (True, False):
            pool = Pool(base, gates, PROMPTS, 24, 5)
            pool._reader.records = records
            outputs.append({(out.prompt, out.cut): out.tokens for out in pool.run(cuts)})
    assert outputs[0] == outputs[1]
    assert max(recordings) == 0 if device.type == "cpu" else max(recordings) > 0
