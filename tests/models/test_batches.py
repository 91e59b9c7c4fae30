"""Packed rows against the same rows alone, and against the padded way; how both lie in tensors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakit.models.base import Base
from lorakit.models.batches import can_pack, fill_packs, lay_out, pack, target_logits
from lorakit.models.lora import default_targets, factors, inject, pick_modules
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.records.record import Record
from lorakit.training.loss import BatchLoss
from tests.support import models
from tests.support.models import FAMILIES, open_base, save_model
from tests.support.training_data import rows

CPU = torch.device("cpu")
_SMALL: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOWED: dict[str, Any] = {
    "mistral": lambda: transformers.MistralConfig(**_SMALL, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SMALL,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
# What does not stop at a row's start: a state, a convolution, and positions that no one can give.
LEAKY: dict[str, Any] = {
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "lfm2": lambda: transformers.Lfm2Config(**_SMALL, layer_types=["conv", "full_attention"]),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, n_layer=2, n_head=4
    ),
}


def examples(base: Base, count: int, longest: int = 6) -> list[Example]:
    encoder = base.encoder(chat="off")
    return [encoder.example(Record(row, row["id"])) for row in rows(count, 0, longest)]


def losses_of(base: Base, tokens: int, *, packed: bool) -> BatchLoss:
    """Return the loss of a base with LoRA that changes it, packed or padded."""
    torch.manual_seed(0)
    modules = pick_modules(base, default_targets(base)[0], None)
    layers = inject(base, dict.fromkeys(modules, 4), alpha=8)
    parameters = [weight for layer in layers.values() for weight in factors(layer)]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_(True)
    losses = BatchLoss(base, parameters, tokens=tokens, accelerator=new_accelerator("cpu"))
    losses.packed = packed
    return losses


def assert_rows_are_their_own(base: Base, batch: list[Example], tolerance: float) -> None:
    packed = target_logits(base.model, pack(batch, CPU)).split([row.targets for row in batch])
    for row, logits in zip(batch, packed, strict=True):
        alone = base.model(input_ids=torch.tensor([row.ids])).logits[0]
        due = alone[row.start - 1 : -1]
        torch.testing.assert_close(logits, due, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_a_packed_row_has_the_logits_of_the_row_alone(family: str, tmp_path: Path) -> None:
    base = open_base(save_model(tmp_path, family))
    assert base.packs
    assert_rows_are_their_own(base, examples(base, 7), 1e-4)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_packed_row_is_seen_through_the_models_own_window(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.FAMILIES, family, WINDOWED[family])
    base = open_base(save_model(tmp_path, family))
    assert base.packs
    batch = examples(base, 5)
    assert min(len(row.ids) for row in batch) > 4
    assert_rows_are_their_own(base, batch, 1e-4)
    narrow = target_logits(base.model, pack(batch, CPU))
    base.model.config.sliding_window = 64
    wide = target_logits(base.model, pack(batch, CPU))
    assert not torch.allclose(narrow, wide, rtol=1e-3)  # the window did decide


def test_gemma_2_caps_its_scores_in_an_attention_of_its_own_and_is_padded(tmp_path: Path) -> None:
    base = open_base(save_model(tmp_path, "gemma2"))
    assert base.model.config._attn_implementation == "eager"
    assert not base.packs


@pytest.mark.parametrize("family", LEAKY)
def test_a_model_whose_rows_would_leak_is_padded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.FAMILIES, family, LEAKY[family])
    base = open_base(save_model(tmp_path, family))
    assert not base.packs


def test_a_model_set_to_attend_otherwise_is_padded(llama: str) -> None:
    base = open_base(llama)
    base.model.set_attn_implementation("eager")
    assert not can_pack(base.model)


def test_a_model_that_keeps_the_name_of_pytorchs_attention_packs(llama: str) -> None:
    base = open_base(llama)
    base.model.set_attn_implementation("sdpa")
    assert can_pack(base.model)
    assert_rows_are_their_own(base, examples(base, 7), 1e-4)


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_packed_and_padded_batches_have_one_loss_and_gradient(
    family: str, tokens: int, tmp_path: Path
) -> None:
    name = save_model(tmp_path, family)
    results = []
    for packed in (True, False):
        losses = losses_of(open_base(name), tokens, packed=packed)
        batch = examples(losses.base, 8)
        loss = float(losses.backward(batch))
        gradients = [parameter.grad for parameter in losses.parameters]
        results.append((loss, gradients, losses.mean(batch), losses.means(batch)))
    packed_so, padded_so = results
    assert packed_so[0] == pytest.approx(padded_so[0], rel=1e-5)
    assert packed_so[2] == pytest.approx(padded_so[2], rel=1e-5)
    assert packed_so[3] == pytest.approx(padded_so[3], rel=1e-5)
    for one, other in zip(packed_so[1], padded_so[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_packed_rows_over_a_bfloat16_base_are_near_the_padded_ones(llama: str) -> None:
    losses_so = []
    for packed in (True, False):
        losses = losses_of(open_base(llama, torch.bfloat16), 10_000, packed=packed)
        losses_so.append(float(losses.backward(examples(losses.base, 8))))
    assert losses_so[0] == pytest.approx(losses_so[1], rel=2e-2)


@pytest.mark.parametrize("at_least", [1, 2, 5])
def test_packs_hold_every_row_once_within_the_budget(llama: str, at_least: int) -> None:
    batch = examples(open_base(llama), 20)
    packed = fill_packs(batch, 90, at_least=at_least)
    assert sorted(row.where for rows in packed for row in rows) == sorted(
        row.where for row in batch
    )
    assert all(len(rows) == 1 or sum(len(row.ids) for row in rows) <= 90 for rows in packed)
    total = sum(len(row.ids) for row in batch)
    assert len(packed) >= max(at_least, total / 90)
    assert len(fill_packs(batch, 10**6, at_least=at_least)) == at_least
    assert len(fill_packs(batch[:2], 10**6, at_least=5)) == 2
    assert len(fill_packs(batch, 1)) == 20
    assert fill_packs([], 90) == []


@pytest.mark.parametrize("tokens", [40, 90, 400])
def test_each_example_joins_the_smallest_pack_and_of_equal_ones_the_first(tokens: int) -> None:
    draw = random.Random(tokens)
    for count in (1, 7, 60):
        some = [Example(tuple(range(draw.randint(2, 60))), 1, f"{n}") for n in range(count)]
        assert fill_packs(some, tokens) == packs_by_the_plain_rule(some, tokens)


def packs_by_the_plain_rule(examples: list[Example], tokens: int) -> list[list[Example]]:
    """Try ever more packs until none of several rows is too large."""
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    least = -(-sum(len(example.ids) for example in ordered) // tokens)
    for count in range(max(least, 1), len(ordered) + 1):
        packs: list[list[Example]] = [[] for _ in range(count)]
        for example in ordered:
            min(packs, key=lambda pack: sum(len(row.ids) for row in pack)).append(example)
        if all(len(pack) == 1 or sum(len(r.ids) for r in pack) <= tokens for pack in packs):
            return packs
    return [[example] for example in ordered]


def test_the_worked_example_is_how_rows_are_padded_and_packed() -> None:
    both = [Example((1, 5, 6, 7, 2), 3, "first"), Example((1, 8, 2), 1, "second")]
    padded = lay_out(both, CPU)
    assert padded.input_ids.tolist() == [[1, 5, 6, 7], [0, 0, 1, 8]]
    assert padded.labels.tolist() == [[7, 2], [8, 2]]
    packed = pack(both, CPU)
    assert packed.input_ids.tolist() == [[1, 5, 6, 7, 1, 8]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert packed.lengths == [4, 2]
    assert packed.places.tolist() == [2, 3, 4, 5]
    assert packed.labels.tolist() == [7, 2, 8, 2]
