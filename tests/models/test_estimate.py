"""The formulae of memory against the tensors that torch holds, and against Python's own sums."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakit.models import last_layer
from lorakit.models.estimate import (
    EIGHT_BIT,
    FOUR_BIT,
    FOUR_BIT_DOUBLE,
    Decoder,
    Precision,
    activation_bytes,
    cache_bytes,
    decoder_of,
    forward_bytes,
    logit_bytes,
    lora_parameters,
    padded_pass,
    quantised_bytes,
    training_pass,
    weight_bytes,
)
from lorakit.models.lora import default_targets, factors, inject, pick_modules, projections
from lorakit.models.skeleton import Skeleton, load_skeleton
from lorakit.models.tokens import Example
from tests.support.models import FAMILIES, open_base, save_model
from tests.support.stored import stored_bytes

CPU = torch.device("cpu")
ROWS = [Example(tuple(range(5, 5 + length)), length - 6, "") for length in (60, 50, 40)]
EXACT = 0.01  # Llama's kind
NEAR = 0.25  # what the formulae say of other families
ALL = ["all-linear"]


@pytest.fixture(autouse=True)
def whole_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulae count the last layer as if it computed all tokens."""
    monkeypatch.setattr(last_layer, "_LARGEST_STEP", 1 << 20)


def stored_and_estimated(
    name: str,
    dtype: torch.dtype = torch.float32,
    targets: list[str] | None = None,
    within: tuple[int, ...] | None = None,
    *,
    dropout: float = 0.05,
    padded: bool = False,
    checkpointing: bool = False,
) -> tuple[int, int]:
    """Return what torch stores for a micro-batch of ROWS, and what the formulae say it does."""
    base, rank = open_base(name, dtype), 8
    ranks = dict.fromkeys(pick_modules(base, targets or default_targets(base)[0], within), rank)
    skeleton = Skeleton(load_skeleton(name, dtype=dtype), CPU)
    size = training_pass(ROWS, packed=base.packs and not padded)
    estimated = activation_bytes(
        skeleton.decoder,
        skeleton.precision,
        size,
        ranks,
        skeleton.shapes,
        dropout=dropout > 0,
        checkpointing=checkpointing,
    )
    logits = logit_bytes(skeleton.decoder, skeleton.precision, size) // 2  # without the gradient
    layers = inject(base, ranks, dropout=dropout)
    stored = stored_bytes(base, layers, ROWS, padded=padded, checkpointing=checkpointing)
    return stored, estimated + logits


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({}, id="packed"),
        pytest.param({"dtype": torch.bfloat16}, id="bfloat16"),
        pytest.param({"padded": True}, id="padded"),
        pytest.param({"padded": True, "dtype": torch.bfloat16}, id="padded bfloat16"),
        pytest.param({"targets": ALL}, id="all projections"),
        pytest.param({"targets": ALL, "dtype": torch.bfloat16}, id="all bfloat16"),
        pytest.param({"targets": ["q_proj", "o_proj", "down_proj"]}, id="own inputs"),
        pytest.param({"within": (1,)}, id="from layer 1 up"),
        pytest.param({"dropout": 0.0}, id="no dropout"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_activations_are_what_torch_stores_within_a_hundredth(
    family: str, case: Any, tmp_path: Path
) -> None:
    stored, estimated = stored_and_estimated(save_model(tmp_path, family), **case)
    assert estimated == pytest.approx(stored, rel=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"llama", "qwen2", "mistral"}))
def test_activations_of_other_families_are_within_a_quarter(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    stored, estimated = stored_and_estimated(save_model(tmp_path, family), dtype)
    assert estimated == pytest.approx(stored, rel=NEAR)


def test_with_checkpointing_what_is_stored_and_one_layer_more_are_counted() -> None:
    stored, estimated = stored_and_estimated("tiny", checkpointing=True)
    whole, _ = stored_and_estimated("tiny")
    assert stored < whole / 8
    assert estimated - stored == pytest.approx(whole / 8, rel=0.05)  # tiny has eight layers


def test_eager_attention_stores_its_matrices() -> None:
    decoder, size = Decoder(2, 32, 48, 4, 2, 8, 300), padded_pass([10, 10], 4)
    ranks, shapes = {"layers.0.q_proj": 2}, {"layers.0.q_proj": (32, 32)}
    plain = activation_bytes(decoder, Precision(4, 4), size, ranks, shapes)
    eager = activation_bytes(decoder, Precision(4, 4, eager=True), size, ranks, shapes)
    assert eager - plain == 2 * 4 * 200 * (4 + 4)  # layers · heads · Σ length² · two tensors


@pytest.mark.parametrize("checkpointing", [False, True])
def test_where_cosines_are_stored_by_head_they_are_counted_so(checkpointing: bool) -> None:
    decoder, size = Decoder(2, 32, 48, 4, 2, 8, 300), padded_pass([10, 10], 4)
    ranks, shapes = {"layers.0.q_proj": 2}, {"layers.0.q_proj": (32, 32)}
    once, by_head = (
        activation_bytes(decoder, precision, size, ranks, shapes, checkpointing=checkpointing)
        for precision in (Precision(2, 2), Precision(2, 2, cosines_by_head=True))
    )
    assert by_head - once == (4 + 2 - 1) * 8 * 20 * 2  # of 4 and of 2 heads, for one of none


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_without_weights_take_what_they_take(family: str, tmp_path: Path) -> None:
    name = save_model(tmp_path, family)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_skeleton(name, dtype=dtype).model
        loaded = open_base(name, dtype).model
        assert all(parameter.is_meta for parameter in model.parameters())
        assert weight_bytes(model) == sum(parameter.nbytes for parameter in loaded.parameters())
        assert projections(model) == projections(loaded)


def test_quantised_projections_take_their_bytes_and_the_rest_stays() -> None:
    model = load_skeleton("tiny", dtype=torch.bfloat16).model
    shapes = {name: shape for name, shape in projections(model).items() if name != "lm_head"}
    inside = sum(out * into for out, into in shapes.values())
    assert weight_bytes(model) - weight_bytes(model, shapes, EIGHT_BIT) == inside
    saved = weight_bytes(model) - weight_bytes(model, shapes, FOUR_BIT)
    assert saved == inside * 2 - inside * 36 // 64  # 32 bytes and a float32 for 64 weights


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, FOUR_BIT),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, FOUR_BIT_DOUBLE),
        ({"load_in_8bit": True, "load_in_4bit": False}, EIGHT_BIT),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, 0.5 + 2 / 64),
        ({"quant_method": "fp8"}, None),
    ],
)
def test_a_config_says_how_its_weights_are_quantised(config: Any, expected: Any) -> None:
    assert quantised_bytes(config) == expected


def test_lora_parameters_are_those_of_peft(llama: str) -> None:
    base = open_base(llama)
    ranks = dict(zip(pick_modules(base, ALL, None), itertools.cycle([1, 2, 5]), strict=False))
    expected = lora_parameters(ranks, projections(base.model))
    layers = inject(base, ranks)
    assert expected == sum(f.numel() for layer in layers.values() for f in factors(layer))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_cache_takes_what_transformers_cache_does(family: str, tmp_path: Path) -> None:
    base = open_base(save_model(tmp_path, family))
    cache: Any = transformers.DynamicCache()
    with torch.no_grad():
        base.model(input_ids=torch.full((3, 17), 7), past_key_values=cache, use_cache=True)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    skeleton = Skeleton(base, CPU)
    assert cache_bytes(skeleton.decoder, skeleton.precision, 3, 17) == held


def test_a_pass_counts_what_is_laid_out() -> None:
    packed, padded = training_pass(ROWS, packed=True), training_pass(ROWS, packed=False)
    assert packed == (59 + 49 + 39, 18, 59**2 + 49**2 + 39**2, False)
    assert padded == (3 * 59, 3 * 6, 3 * 59**2, True)
    assert not training_pass(ROWS[:1] * 2, packed=False).padded


def test_reading_without_gradients_takes_the_layer_or_the_logits_whichever_is_more() -> None:
    decoder, size = Decoder(2, 32, 48, 4, 2, 8, 300), padded_pass([10, 10], 20)
    few = forward_bytes(decoder, Precision(4, 4), size._replace(logits=1))
    assert forward_bytes(decoder, Precision(4, 4), size) == 20 * 300 * 8 > few
    deeper = replace(decoder, layers=80)
    assert forward_bytes(deeper, Precision(4, 4), size._replace(logits=1)) == few


def test_the_widths_of_a_decoder_come_from_any_familys_config() -> None:
    gpt2 = decoder_of(FAMILIES["gpt2"]())
    assert (gpt2.layers, gpt2.hidden, gpt2.intermediate, gpt2.kv_heads) == (3, 32, 128, 4)
    gemma = decoder_of(FAMILIES["gemma2"]())
    assert (gemma.head_width, gemma.kv_heads, gemma.vocabulary) == (8, 2, 300)
