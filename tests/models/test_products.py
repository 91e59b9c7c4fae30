"""Products by oneDNN against PyTorch's own, and against float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from lorakit.models import products
from lorakit.models.generation import generate
from lorakit.models.products import fast_layers, packed_weights, speed_up_products_
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings
from tests.support.models import open_base

LARGE, SMALL = (520, 512), (64, 32)  # what a layer gives and takes

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the processor, oneDNN is taken for the faster one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    trials = products._is_faster_here, products._packs_here
    for trial in trials:
        trial.cache_clear()
    yield
    for trial in trials:
        trial.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that oneDNN multiplies by."""
    shapes: list[tuple[int, ...]] = []
    product = products._product
    products._is_faster_here()

    def noting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return product(x, weight, bias)

    monkeypatch.setattr(products, "_product", noting)
    return shapes


def layer_of(size: tuple[int, int], *, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(0)
    layer = torch.nn.Linear(size[1], size[0], bias=bias)
    return layer.requires_grad_(False)


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

    monkeypatch.setattr(products, "_product", missing)
    layer = layer_of(LARGE)
    speed_up_products_(layer)
    assert "forward" not in vars(layer)


# — weights in oneDNN's order —


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
    for packed in (True, False):
        given = torch.ones(3, LARGE[1], requires_grad=True)
        with packed_weights(model) if packed else contextlib.nullcontext():
            model(given).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(*grads)


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
    monkeypatch.setattr(products, "_packs_here", lambda: False)
    with packed_weights(model):
        assert all(len(layer.get_parameter("weight")) for layer in model.children())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_those_that_plain_weights_give(
    temperature: float, faster: None, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, packed = open_base(llama), 0
    speed_up_products_(base.model)
    records = [Record({"prompt": f"{number} and"}, f"d:{number}") for number in range(5)]
    settings = GenerationSettings(
        batch_size=2, max_new_tokens=20, chat="off", temperature=temperature
    )
    texts = []
    for large in (10**9, 1):
        monkeypatch.setattr(products, "_LARGE", large)
        with packed_weights(base.model):
            packed = sum(weight.numel() == 0 for weight in base.model.parameters())
        found = generate(base, base.encoder(chat="off"), records, settings)
        texts.append([record.fields["prediction"] for record, _ in found])
    assert packed > 8
    assert texts[0] == texts[1]
