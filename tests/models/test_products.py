"""Products by oneDNN against PyTorch's own, and against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from lorakit.models import products
from lorakit.models.products import fast_layers, speed_up_products_
from tests.support.models import open_base
from tests.support.products import LARGE, layer_of, multiplied

SMALL = (64, 32)  # what a layer gives and takes

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that oneDNN multiplies by."""
    products.is_faster_here()  # by a trial, of other products
    return multiplied(monkeypatch, products)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 1), ()])
def test_values_and_gradients_are_as_exact_as_pytorchs(
    faster: None, calls: list[tuple[int, ...]], shape: tuple[int, ...], bias: bool
) -> None:
    layer = layer_of(LARGE, bias=bias)
    plain, wide = copy.deepcopy(layer), copy.deepcopy(layer).double()
    speed_up_products_(layer)
    x, due = torch.randn(*shape, LARGE[1]), torch.randn(*shape, LARGE[0])
    results = []
    for other in (layer, plain, wide):
        given = x.to(other.weight.dtype).requires_grad_(True)
        y = other(given)
        (grad,) = torch.autograd.grad(y, given, due.to(y.dtype))
        results.append((y.detach().double(), grad.double()))
    assert len(calls) == 2, "one forwards and one backwards"
    for ours, pytorchs, exact in zip(*results, strict=True):
        assert ours.shape == pytorchs.shape
        worst = (pytorchs - exact).abs().max()
        assert (ours - exact).abs().max() <= 4 * worst + 1e-7


def test_few_shapes_are_multiplied(faster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, counts = layer_of(LARGE), set[int]()
    plain = copy.deepcopy(layer)
    multiply = torch.ops.mkldnn._linear_pointwise

    def noting(x: torch.Tensor, *others: Any) -> Any:
        counts.add(len(x))
        return multiply(x, *others)

    speed_up_products_(layer)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noting)
    x = torch.randn(600, LARGE[1])
    for count in (*range(1, 70), 127, 129, 250, 257, 500, 512, 513, 600):
        torch.testing.assert_close(layer(x[:count]), plain(x[:count]), rtol=1e-4, atol=1e-5)
    assert counts == {1, *range(4, 65, 4), 72, 128, 144, 256, 288, 512, 513, 600}


def test_inputs_that_are_slices_and_none_at_all_are_taken(faster: None) -> None:
    layer = layer_of(LARGE)
    plain = copy.deepcopy(layer)
    speed_up_products_(layer)
    x = torch.randn(5, 9, LARGE[1])
    for part in (x[:, 3:5], x[::2], x.transpose(0, 1), x[:0]):
        torch.testing.assert_close(layer(part), plain(part), rtol=1e-4, atol=1e-5)


def test_what_is_small_or_of_another_kind_is_left_to_pytorch(
    faster: None, calls: list[tuple[int, ...]]
) -> None:
    small = layer_of(SMALL)
    speed_up_products_(small)
    assert torch.equal(small(torch.ones(2, SMALL[1])), linear(torch.ones(2, 32), small.weight))
    assert not calls
    small(torch.ones(1 << 13, SMALL[1]))  # many tokens
    assert calls == [SMALL]
    trained = layer_of(LARGE).requires_grad_(True)
    speed_up_products_(trained)
    trained(torch.ones(3, LARGE[1])).sum().backward()
    assert trained.weight.grad is not None
    assert len(calls) == 1
    half = layer_of(LARGE).bfloat16()
    speed_up_products_(half)
    assert "forward" not in vars(half)


def test_a_change_of_the_weights_is_seen(faster: None) -> None:
    layer = layer_of(LARGE)
    speed_up_products_(layer)
    x = torch.randn(4, LARGE[1])
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)


def test_a_copy_multiplies_by_its_own_weights(faster: None) -> None:
    layer = layer_of(LARGE)
    speed_up_products_(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    x = torch.randn(4, LARGE[1])
    assert not other(x).any()
    assert layer(x).any()


def test_a_base_computes_as_before(faster: None, llama: str) -> None:
    base = open_base(llama)
    ids = torch.arange(60)[None] % 40
    with torch.inference_mode():
        fast = base.model(input_ids=ids).logits
        assert any("forward" in vars(m) for m in base.model.modules())
        for layer in fast_layers(base.model):
            del layer.forward
        assert not any("forward" in vars(m) for m in base.model.modules())
        plain = base.model(input_ids=ids).logits
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_a_build_without_the_product_goes_without(
    faster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*arguments: object) -> torch.Tensor:
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(products, "product", missing)
    layer = layer_of(LARGE)
    speed_up_products_(layer)
    assert "forward" not in vars(layer)
