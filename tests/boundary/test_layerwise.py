"""The layer-by-layer reader against the model's own passes, family by family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.names import layer_of
from lorakit.boundary import layerwise as module
from lorakit.boundary.cuts import BASE, Cut, Point, bottom, cut_at, layer_order
from lorakit.boundary.gates import Gates
from lorakit.boundary.layerwise import Layerwise, layerwise_for, read_alone
from lorakit.boundary.loss import losses_under
from lorakit.models.base import Base
from lorakit.models.lora import attach
from lorakit.models.tokens import Example
from lorakit.records.record import Record
from tests.support.boundary_models import Notes, random_adapter
from tests.support.models import FAMILIES, LAYERS, open_base, save_model
from tests.support.training_data import rows

EVERY = list(range(LAYERS + 1))


def examples_of(base: Base, count: int) -> list[Example]:
    encoder = base.encoder(chat="off")
    return [encoder.example(Record(row, f"data:{row['id']}")) for row in rows(count)]


def loss_by_hand(base: Base, adapter: Any, example: Example) -> float:
    """Return the summed loss of a completion by PEFT's own layers, one row without padding."""
    if adapter is not None:
        attach(base, adapter)
    ids = torch.tensor([example.ids])
    with torch.no_grad():
        logits = base.model(input_ids=ids[:, :-1]).logits[0, example.start - 1 :]
    gold = ids[0, example.start :]
    return float(-logits.log_softmax(-1).gather(1, gold[:, None]).sum())


def scaled(adapter: Adapter, cut: Cut) -> Adapter:
    """Return the adapter with every B multiplied by what is left in its layer."""
    factors = {m.name: (m.a, m.b * cut.left_in(layer_of(m.name))) for m in adapter.modules()}
    return Adapter(tensors_of(factors), adapter.config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", ["bottom", "top", "random"])
def test_every_cut_has_the_loss_of_the_stripped_adapter_alone(
    family: str, keep: str, tmp_path: Path
) -> None:
    name = save_model(tmp_path, family)
    base = open_base(name)
    adapter, examples = random_adapter(base), examples_of(base, 6)
    order = layer_order(keep, LAYERS, seed=1)
    cuts = {k: cut_at(Point(k), order) for k in EVERY}
    notes = Notes()
    sums = losses_under(base, adapter, examples, cuts, 1, notes)
    assert notes.notes == []
    assert len({tuple(losses) for losses in sums.values()}) == len(EVERY)
    for k in EVERY:
        alone = open_base(name)
        stripped = scaled(adapter, cuts[k])
        expected = [loss_by_hand(alone, stripped, example) for example in examples]
        assert sums[k] == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_of_every_family_is_trimmed(family: str, tmp_path: Path) -> None:
    base = open_base(save_model(tmp_path, family))
    cuts = [bottom(k, LAYERS) for k in reversed(EVERY)]
    with Gates(attach(base, random_adapter(base))).standing() as gates:
        reader = layerwise_for(base, gates, examples_of(base, 5), cuts)
        assert reader is not None
        assert reader._trims


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_shorter_than_a_row_is_kept(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of = FAMILIES[family]

    def narrow() -> Any:
        config = config_of()
        config.sliding_window = 8
        return config

    monkeypatch.setitem(FAMILIES, family, narrow)
    name = save_model(tmp_path, family)
    base = open_base(name)
    adapter, examples = random_adapter(base), examples_of(base, 6)
    cuts = {k: bottom(k, LAYERS) for k in EVERY}
    sums = losses_under(base, adapter, examples, cuts, 16, Notes())
    for k in EVERY:
        stripped = scaled(adapter, cuts[k])
        expected = [loss_by_hand(open_base(name), stripped, example) for example in examples]
        assert sums[k] == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_factor_is_an_adapter_whose_upper_b_are_scaled(family: str, tmp_path: Path) -> None:
    name = save_model(tmp_path, family)
    base = open_base(name)
    adapter, examples = random_adapter(base), examples_of(base, 4)
    points = [BASE, *(Point(k, f) for k in EVERY[1:] for f in (0.0, 0.3, 0.5, 1.0))]
    cuts = {point: cut_at(point, range(LAYERS)) for point in points}
    sums = losses_under(base, adapter, examples, cuts, 16, Notes())
    assert sums[Point(1, 1.0)] == sums[Point(LAYERS)]
    for point in points:
        alone = scaled(adapter, cuts[point])
        expected = [loss_by_hand(open_base(name), alone, example) for example in examples]
        assert sums[point] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def layers_run(base: Base, cuts: Sequence[Cut], examples: Sequence[Example]) -> list[int]:
    """Return how often each layer runs when examples are read in one batch."""
    counts = [0] * LAYERS
    with Gates(attach(base, random_adapter(base))).standing() as gates:
        reader = Layerwise(base, gates, trims=False)
        for number, layer in enumerate(base.model.model.layers):

            def count(*_: object, number: int = number) -> None:
                counts[number] += 1

            layer.register_forward_hook(count)
        list(reader.read(examples, cuts))
    return counts


@pytest.mark.parametrize(
    ("keep", "counts"), [("bottom", [2, 3, 4]), ("top", [2, 3, 4])], ids=["bottom", "top"]
)
def test_what_cuts_share_runs_once(llama: str, keep: str, counts: list[int]) -> None:
    base, order = open_base(llama), layer_order(keep, LAYERS, 0)
    inside = set(range(LAYERS))  # no LoRA outside the layers
    cuts = sorted((cut_at(Point(k), order).on(inside) for k in EVERY), reverse=True)
    assert layers_run(base, cuts, examples_of(base, 3)) == counts


def test_a_trimmed_layer_reads_the_learnt_positions_alone(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_base(llama)
    examples = examples_of(base, 3)
    width = max(example.targets for example in examples)
    seen: list[int] = []
    with Gates(attach(base, random_adapter(base))).standing() as gates:
        last = base.model.model.layers[-1].mlp
        last.register_forward_hook(lambda m, inputs, output: seen.append(output.shape[1]))
        reader = Layerwise(base, gates, trims=True)
        list(reader.read(examples, [bottom(k, LAYERS) for k in reversed(EVERY)]))
    assert seen == [max(len(row.ids) for row in examples) - 1, *[width] * LAYERS]


def test_logits_are_computed_a_few_at_a_time(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base(llama)
    examples, cuts = examples_of(base, 4), {k: bottom(k, LAYERS) for k in EVERY}
    expected = losses_under(base, random_adapter(base), examples, cuts, 16, Notes())
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 600)
    sizes: list[int] = []
    base.model.lm_head.register_forward_hook(lambda m, i, out: sizes.append(out.shape[1]))
    sums = losses_under(base, random_adapter(base), examples, cuts, 16, Notes())
    for k in EVERY:
        assert sums[k] == pytest.approx(expected[k], rel=1e-6)
    assert sizes.count(2) > len(EVERY)


def test_a_model_that_cannot_be_read_layer_by_layer_takes_a_pass_for_each_boundary(
    llama: str,
) -> None:
    base = open_base(llama)
    adapter, examples = random_adapter(base), examples_of(base, 4)
    cuts = {k: bottom(k, LAYERS) for k in EVERY}
    expected = losses_under(base, adapter, examples, cuts, 16, Notes())
    base, notes = open_base(llama), Notes()
    decoder = base.model.model
    decoder.register_forward_hook(  # the same values elsewhere in memory: no norm is the last part
        lambda m, i, out: type(out)(last_hidden_state=out.last_hidden_state.clone())
    )
    sums = losses_under(base, adapter, examples, cuts, 16, notes)
    assert notes.notes == [f"{llama} cannot be read layer by layer: one pass for each boundary"]
    for k in EVERY:
        assert sums[k] == pytest.approx(expected[k], rel=1e-5)


def test_a_layer_that_takes_no_cache_is_read_whole(llama: str) -> None:
    base = open_base(llama)
    examples, cuts = examples_of(base, 4), [bottom(k, LAYERS) for k in reversed(EVERY)]
    for layer in base.model.model.layers:
        layer.forward = lambda hidden_states, plain=layer.forward, **named: plain(
            hidden_states, **named
        )
    with Gates(attach(base, random_adapter(base))).standing() as gates:
        reader = layerwise_for(base, gates, examples, cuts)
        assert reader is not None
        assert not reader._trims
        ours = [losses.sums for losses in reader.read(examples, cuts)]
        theirs = [losses.sums for losses in read_alone(base, gates, examples, cuts)]
    assert torch.allclose(torch.stack(ours), torch.stack(theirs), rtol=1e-5)


def test_half_precision_comes_near(llama: str) -> None:
    cuts = {k: bottom(k, LAYERS) for k in EVERY}
    whole, half = (
        losses_under(base, random_adapter(base), examples_of(base, 4), cuts, 16, Notes())
        for base in (open_base(llama), open_base(llama, torch.bfloat16))
    )
    for k in EVERY:
        assert half[k] == pytest.approx(whole[k], rel=0.05)
        assert half[k] != whole[k]


def test_the_model_is_as_it_was_afterwards(llama: str) -> None:
    base, (example, *others) = open_base(llama), examples_of(open_base(llama), 3)
    adapter = random_adapter(base)
    cuts = {k: bottom(k, LAYERS) for k in EVERY}
    losses_under(base, adapter, [example, *others], cuts, 16, Notes())
    expected = loss_by_hand(open_base(llama), adapter, example)
    assert loss_by_hand(replace(base), adapter, example) == pytest.approx(expected, rel=1e-6)
