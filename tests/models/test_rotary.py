"""Rotary positions by fewer operations against transformers' own functions, to the bit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from lorakit.models.rotary import _Rotary, fused_rotary, fusible_modules
from tests.support import models
from tests.support.devices import DEVICES, here
from tests.support.models import open_base, save_model


def turned(
    rotate: Any, device: torch.device, dtype: torch.dtype, heads: tuple[int, int]
) -> list[torch.Tensor]:
    """Return queries and keys turned, and the gradients of what they are made from."""
    draw = torch.Generator().manual_seed(0)
    rows, tokens, width = 2, 7, 8
    cos, sin = torch.randn(2, rows, tokens, width, generator=draw).to(device, dtype)
    made = [
        torch.randn(rows, tokens, count * width, generator=draw).to(device, dtype).requires_grad_()
        for count in heads
    ]
    q, k = (values.unflatten(-1, (-1, width)).transpose(1, 2) for values in made)
    results = rotate(q, k, cos, sin)
    grads = [torch.randn(r.shape, generator=draw).to(device, dtype) for r in results]
    torch.autograd.backward(results, grads)
    return [*results, *(values.grad for values in made if values.grad is not None)]


def layout(values: torch.Tensor) -> list[int]:
    """Return the strides of the dimensions that have any."""
    return [stride for stride, size in zip(values.stride(), values.shape, strict=True) if size > 1]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DEVICES)
def test_values_and_gradients_are_transformers_to_the_bit(
    name: str, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    device, plain = here(name), modeling_llama.apply_rotary_pos_emb
    expected = turned(plain, device, dtype, heads)
    found = turned(_Rotary(plain), device, dtype, heads)
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert layout(one) == layout(other), "attention is given another layout"


def test_the_angles_of_one_pass_are_not_taken_for_those_of_the_next() -> None:
    rotate = _Rotary(modeling_llama.apply_rotary_pos_emb)
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        q, k = torch.randn(2, 1, 2, 5, 8, generator=draw)
        cos, sin = torch.randn(2, 1, 5, 8, generator=draw)
        expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        assert all(map(torch.equal, rotate(q, k, cos, sin), expected))


@pytest.mark.parametrize(
    "given", ["narrow angles", "wide angles", "heads last", "positions by name"]
)
def test_what_it_does_not_compute_itself_is_left_to_the_family(given: str) -> None:
    asked: list[str] = []

    def plain(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None, **_: Any) -> Any:
        asked.append(given)
        return q, k

    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    cos = sin = torch.randn(1, 5, 8)
    rotate = _Rotary(plain)
    if given == "narrow angles":
        rotate(q, k, cos[..., :4], sin[..., :4])
    elif given == "wide angles":
        rotate(q, k, cos.double(), sin.double())
    elif given == "positions by name":
        rotate(q, k, cos, sin, position_ids=torch.arange(5))
    else:
        expected = modeling_llama.apply_rotary_pos_emb(q, k, cos[:, :2], sin[:, :2], 2)
        found = rotate(q, k, cos[:, :2], sin[:, :2], unsqueeze_dim=2)
        assert all(map(torch.equal, found, expected))
        return
    assert asked == [given]


@pytest.mark.parametrize(
    ("family", "fuses"), [("llama", True), ("phi3", True), ("cohere", False), ("gpt2", False)]
)
def test_inside_the_block_alone_a_model_computes_the_same_by_it(
    family: str, fuses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbours = transformers.CohereConfig(**models._SIZES)  # are what it turns, not halves
    monkeypatch.setitem(models.FAMILIES, "cohere", lambda: neighbours)
    base = open_base(save_model(tmp_path, family))
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = base.model(input_ids=ids).logits
    module = importlib.import_module(type(base.model).__module__)
    before = getattr(module, "apply_rotary_pos_emb", None)
    with fused_rotary(base.model):
        inside = getattr(module, "apply_rotary_pos_emb", None)
        found = base.model(input_ids=ids).logits
        assert not list(fusible_modules(base.model)), "what is replaced is not replaced again"
    assert torch.equal(found, expected)
    assert isinstance(inside, _Rotary) == fuses
    assert getattr(module, "apply_rotary_pos_emb", None) is before
