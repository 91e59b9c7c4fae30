"""Weights in oneDNN's order against plain ones."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.models import packed
from lorakit.models.generation import generate
from lorakit.models.packed import packed_weights
from lorakit.models.products import speed_up_products_
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings
from tests.support.models import FAMILIES, open_base, save_model
from tests.support.products import LARGE, layer_of, multiplied

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def two_layers() -> torch.nn.Module:
    """A model of a large layer and a small one, which multiply by oneDNN."""
    model = torch.nn.Sequential(layer_of(LARGE, bias=True), layer_of((8, LARGE[0])))
    speed_up_products_(model)
    return model


@pytest.mark.parametrize("tokens", [1, 5, 16, 70, 700])
def test_packed_weights_give_what_plain_ones_give(faster: None, tokens: int) -> None:
    model = two_layers()
    before, x = weights_of(model), torch.randn(tokens, LARGE[1])
    expected = copy.deepcopy(model).double()(x.double())
    forwards = [vars(layer)["forward"] for layer in model.children()]
    with torch.inference_mode(), packed_weights(model):
        assert [len(layer.get_parameter("weight")) for layer in model.children()] == [0, 8]
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert [vars(layer)["forward"] for layer in model.children()] == forwards
    after = weights_of(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    given = x.clone().requires_grad_(True)
    model(given).sum().backward()  # inside inference_mode no weight was made that cannot train
    assert given.grad is not None


def test_an_error_inside_gives_the_weights_back(faster: None) -> None:
    model = two_layers()
    before = weights_of(model)
    with pytest.raises(ZeroDivisionError), packed_weights(model):
        _ = 1 / 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_a_gradient_inside_is_that_of_plain_weights(faster: None) -> None:
    model, grads = two_layers(), []
    for is_packed in (True, False):
        given = torch.ones(3, LARGE[1], requires_grad=True)
        with packed_weights(model) if is_packed else contextlib.nullcontext():
            model(given).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads)


class Attention(torch.nn.Module):
    """Three projections of one input, the second with LoRA's wrapper about it, as PEFT has it."""

    def __init__(self, sizes: Sequence[int], *, bias: bool = False) -> None:
        super().__init__()
        self.q_proj, key, self.v_proj = (layer_of((n, LARGE[1]), bias=bias) for n in sizes)
        self.k_proj = torch.nn.Module()
        self.k_proj.base_layer = key

    def layers(self) -> list[Any]:
        return [self.q_proj, self.k_proj.base_layer, self.v_proj]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2, 9), ()])
def test_layers_that_read_the_same_are_one_product(
    faster: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bias: bool
) -> None:
    model = Attention((512, 128, 96), bias=bias)
    before, shapes = weights_of(model), multiplied(monkeypatch, packed)
    inputs = [torch.randn(*shape, LARGE[1]) for _ in range(2)]
    expected = [[layer(x) for layer in model.layers()] for x in inputs]
    with torch.inference_mode(), packed_weights(model):
        assert not any(layer.weight.numel() for layer in model.layers())
        for x, due in zip(inputs, expected, strict=True):
            for layer, plain in zip(model.layers(), due, strict=True):
                torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
        assert shapes == [(512 + 128 + 96, LARGE[1])] * 2
    after = weights_of(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    places = [layer.weight.untyped_storage().data_ptr() for layer in model.layers()]
    assert len(set(places)) == 3


def test_layers_asked_in_any_order_or_for_other_inputs_give_their_own(faster: None) -> None:
    model = Attention((512, 128, 96))
    draw = random.Random(0)
    inputs = [torch.randn(3, LARGE[1]) for _ in range(2)]
    asked = [(draw.randrange(3), draw.randrange(2)) for _ in range(40)]
    expected = [model.layers()[place](inputs[x]) for place, x in asked]
    with torch.inference_mode(), packed_weights(model):
        for (place, x), plain in zip(asked, expected, strict=True):
            found = model.layers()[place](inputs[x])
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_a_gradient_is_that_of_each_layers_own_weights(faster: None) -> None:
    model, grads = Attention((512, 128, 96), bias=True), []
    for is_packed in (True, False):
        x = torch.ones(3, LARGE[1], requires_grad=True)
        with packed_weights(model) if is_packed else contextlib.nullcontext():
            sum(layer(x).square().sum() for layer in model.layers()).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_layers_that_do_not_fit_are_products_of_their_own(faster: None) -> None:
    with_bias = Attention((512, 512, 512))
    with_bias.v_proj = layer_of(LARGE, bias=True)
    twice = Attention((512, 512, 512))
    twice.v_proj = twice.q_proj
    small = Attention((8, 8, 8))
    for model, layers in (
        (with_bias, with_bias.layers()),
        (twice, twice.layers()[:2]),
        (small, []),
    ):
        groups = packed._packable(model)
        assert all(len(group) == 1 for group in groups)
        assert {layer for (layer,) in groups} == set(layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_layers_are_products_together(
    faster: None, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_base(save_model(tmp_path, family))
    monkeypatch.setattr(packed, "LARGE", 1)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        plain = base.model(input_ids=ids).logits
        with packed_weights(base.model):
            shapes = multiplied(monkeypatch, packed)
            found = base.model(input_ids=ids).logits
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    layers = packed._packable(base.model)
    assert len(shapes) == len(layers), "no product is computed twice"


def test_weights_that_others_read_stay(faster: None) -> None:
    shared, trained, plain = (layer_of(LARGE) for _ in range(3))
    other = torch.nn.Embedding(*LARGE)
    other.weight = shared.weight
    trained.requires_grad_(True)
    model = torch.nn.ModuleList([shared, other, trained, plain])
    with packed_weights(model):
        assert [len(module.get_parameter("weight")) for module in model] == [*[LARGE[0]] * 3, 0]
    magnitudes = torch.nn.ModuleDict({"default": torch.nn.Identity()})
    model.lora_magnitude_vector = magnitudes  # as DoRA's layers of PEFT have
    with packed_weights(model):
        assert len(plain.weight) == LARGE[0]


def test_a_build_that_cannot_pack_keeps_plain_weights(
    faster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_layers()
    monkeypatch.setattr(packed, "_packs_here", lambda: False)
    with packed_weights(model):
        assert all(len(layer.get_parameter("weight")) for layer in model.children())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_those_that_plain_weights_give(
    temperature: float, faster: None, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, count = open_base(llama), 0
    speed_up_products_(base.model)
    records = [Record({"prompt": f"{number} and"}, f"d:{number}") for number in range(5)]
    settings = GenerationSettings(
        batch_size=2, max_new_tokens=20, chat="off", temperature=temperature
    )
    texts = []
    for large in (10**9, 1):
        monkeypatch.setattr(packed, "LARGE", large)
        with packed_weights(base.model):
            count = sum(weight.numel() == 0 for weight in base.model.parameters())
        found = generate(base, base.encoder(chat="off"), records, settings)
        texts.append([record.fields["prediction"] for record, _ in found])
    assert count > 8
    assert texts[0] == texts[1]
