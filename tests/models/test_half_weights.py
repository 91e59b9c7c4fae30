"""Products with weights in 16 bits against those with the weights themselves."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorakit.models import devices, half_weights, packed
from lorakit.models.devices import available_memory
from lorakit.models.generation import generate
from lorakit.models.half_weights import FEW, half_size, multiplies_half
from lorakit.models.packed import packed_weights, reads_half
from lorakit.models.products import speed_up_products_
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings
from tests.support.models import open_base, save_model
from tests.support.products import LARGE, layer_of

pytestmark = pytest.mark.skipif(
    not multiplies_half(), reason="PyTorch does not multiply by float16 here"
)
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture(name="pool")
def a_pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def weights_in(dtype: torch.dtype, size: float = 0.05) -> torch.Tensor:
    """Return float32 weights that a format holds, 64 × 300; a few are very small, or zero."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 300, generator=draw) * size
    weight[:, :3] *= torch.tensor([2.0**-15, -(2.0**-13), 0.0])
    return weight.to(dtype).float()


@pytest.mark.parametrize("size", [0.05, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_no_digit_of_any_weight_is_lost(
    dtype: torch.dtype, size: float, pool: ThreadPoolExecutor
) -> None:
    weight = weights_in(dtype, size)
    half = half_weights.half_weights(weight, None, pool)
    assert half is not None
    assert torch.equal(half(torch.eye(300)), weight.t())


def test_weights_below_float16s_range_are_scaled(pool: ThreadPoolExecutor) -> None:
    weight = weights_in(BRAIN)
    assert not torch.equal(weight.half().float(), weight)
    half, x = half_weights.half_weights(weight, None, pool), torch.randn(7, 300)
    assert half is not None
    assert half._factor == 2.0 ** -math.floor(math.log2(65504 / weight.abs().max()))
    torch.testing.assert_close(half(x), x @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2, 9), (), (FEW,)])
def test_products_are_those_of_the_weights(
    shape: tuple[int, ...], bias: bool, pool: ThreadPoolExecutor
) -> None:
    weight, added = weights_in(HALF), torch.randn(64) if bias else None
    half, x = half_weights.half_weights(weight, added, pool), torch.randn(*shape, 300)
    assert half is not None
    due = torch.nn.functional.linear(
        x.double(), weight.double(), None if added is None else added.double()
    )
    torch.testing.assert_close(half(x).double(), due, rtol=1e-5, atol=1e-5)


def test_a_row_gives_the_same_however_many_come_with_it(pool: ThreadPoolExecutor) -> None:
    half, x = half_weights.half_weights(weights_in(HALF), None, pool), torch.randn(40, 300)
    assert half is not None
    whole = half(x)
    assert all(torch.equal(half(x[:count]), whole[:count]) for count in range(1, 40))


@pytest.mark.parametrize("wrong", [0.1, 2.0**-60, math.inf, -math.inf, math.nan])
def test_there_are_none_where_one_weight_does_not_fit(
    wrong: float, pool: ThreadPoolExecutor
) -> None:
    weight = weights_in(BRAIN)
    weight[50, 7] = wrong
    assert half_weights.half_weights(weight, None, pool) is None
    assert half_weights.half_weights(torch.zeros(3, 5), None, pool) is not None


def layer_in(dtype: torch.dtype, *, bias: bool = False) -> torch.nn.Linear:
    layer = layer_of(LARGE, bias=bias)
    layer.weight.data = layer.weight.data.to(dtype).float()
    return layer


def test_layers_read_weights_in_16_bits_for_few_tokens(faster: None) -> None:
    layers = [layer_in(HALF, bias=True), layer_in(BRAIN), layer_of(LARGE)]
    model = torch.nn.ModuleList(copy.deepcopy(layers))
    speed_up_products_(model)
    inputs = [torch.randn(count, LARGE[1]) for count in (5, FEW + 1)]
    expected = [[layer(x) for x in inputs] for layer in layers]
    before = [layer.weight.data_ptr() for layer in model]  # type: ignore[operator]
    with torch.inference_mode(), packed_weights(model):
        assert [reads_half(layer) for layer in model] == [True, True, False]  # type: ignore[arg-type]
        assert [len(layer.get_parameter("weight")) for layer in model] == [*[LARGE[0]] * 2, 0]
        for layer, due in zip(model, expected, strict=True):
            for x, result in zip(inputs, due, strict=True):
                torch.testing.assert_close(layer(x), result, rtol=1e-5, atol=1e-5)
    assert not any(reads_half(layer) for layer in model)  # type: ignore[arg-type]
    assert [layer.weight.data_ptr() for layer in model][:2] == before[:2]  # type: ignore[operator]


def test_a_gradient_is_that_of_the_weights(faster: None) -> None:
    model, grads = torch.nn.Sequential(layer_in(HALF)), []
    for is_half in (True, False):
        x = torch.ones(3, LARGE[1], requires_grad=True)
        with packed_weights(model) if is_half else contextlib.nullcontext():
            model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_a_head_that_shares_the_embeddings_weights_reads_its_own(faster: None) -> None:
    head, embedding = layer_in(HALF), torch.nn.Embedding(*LARGE)
    embedding.weight = head.weight
    with packed_weights(torch.nn.ModuleList([head, embedding])):
        assert reads_half(head)
        assert embedding(torch.tensor([3])).shape == (1, LARGE[1])


def test_without_memory_for_three_copies_there_is_none(
    faster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.ModuleList([layer_in(HALF)])
    size = half_size(layer_in(HALF))
    assert size == 2 * LARGE[0] * 512
    for free, due in ((3 * size, True), (3 * size - 1, False)):
        monkeypatch.setattr(packed, "available_memory", lambda free=free: free)
        with packed_weights(model):
            assert [reads_half(layer) for layer in model] == [due]  # type: ignore[arg-type]


def test_inputs_are_filled_up_to_whole_blocks() -> None:
    assert half_size(torch.nn.Linear(576, 10)) == 2 * 10 * 1024


def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_GROUP", str(tmp_path))
    (tmp_path / "memory.current").write_text("3000\n")
    for limit, due in (("5000\n", 2000), ("2000\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert available_memory() == due
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > 10_000


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_texts_are_those_that_the_weights_give(
    dtype: torch.dtype, faster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_base(save_model(tmp_path, "llama"))
    for weight in base.model.parameters():
        weight.data = weight.data.to(dtype).float()
    speed_up_products_(base.model)
    records = [Record({"prompt": f"{number} and"}, f"d:{number}") for number in range(5)]
    settings = GenerationSettings(batch_size=2, max_new_tokens=20, chat="off")
    texts, halved = [], 0
    for large in (10**9, 1):
        monkeypatch.setattr(packed, "LARGE", large)
        with packed_weights(base.model):
            halved = sum(map(reads_half, filter(is_linear, base.model.modules())))
        found = generate(base, base.encoder(chat="off"), records, settings)
        texts.append([record.fields["prediction"] for record, _ in found])
    assert halved > 8
    assert texts[0] == texts[1]


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)
