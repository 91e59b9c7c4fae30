"""Rotary positions by fewer operations against transformers' own functions, to the bit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from lorakit.models.rotary import _computes_the_same, _Rotary, fused_rotary, fusible_modules
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


Q, ANGLES = torch.randn(1, 2, 5, 8), torch.randn(1, 5, 8)
LEFT: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "narrow angles": ((Q, Q, ANGLES[..., :4], ANGLES[..., :4]), {}),
    "wide angles": ((Q, Q, ANGLES.double(), ANGLES.double()), {}),
    "positions": ((Q, Q, ANGLES, ANGLES), {"position_ids": torch.arange(5)}),
    "positions without a name": ((Q, Q, ANGLES, ANGLES, torch.arange(5)), {}),
    "angles by name": ((Q,), {"cos": ANGLES, "sin": ANGLES}),
    "one row": ((Q[0], Q[0], ANGLES[0], ANGLES[0]), {}),
    "heads first": ((Q, Q, ANGLES, ANGLES), {"unsqueeze_dim": 0}),
}


@pytest.mark.parametrize(("given", "options"), LEFT.values(), ids=LEFT.keys())
def test_what_it_does_not_compute_itself_is_left_to_the_family(
    given: tuple[torch.Tensor, ...], options: dict[str, Any]
) -> None:
    asked: list[Any] = []

    def plain(*given: torch.Tensor, **options: Any) -> Any:
        asked.append((given, options))
        return given

    _Rotary(plain)(*given, **options)
    assert asked == [(given, options)]


def test_heads_may_come_after_tokens() -> None:
    plain = modeling_llama.apply_rotary_pos_emb
    q, k = torch.randn(2, 1, 5, 2, 8)
    expected = plain(q, k, ANGLES, ANGLES, 2)
    found = _Rotary(plain)(q, k, ANGLES, ANGLES, unsqueeze_dim=2)
    assert all(map(torch.equal, found, expected))


def test_angles_of_two_kinds_are_each_prepared_once_in_a_pass(llama: str) -> None:
    base = open_base(llama)
    kinds = [(ANGLES, ANGLES.flip(1)), (ANGLES.cos(), ANGLES.sin())]
    with fused_rotary(base.model):
        rotate: Any = modeling_llama.apply_rotary_pos_emb
        for layer in range(6):
            cos, sin = kinds[layer % 2]
            expected = rotate._plain(Q, Q, cos, sin)
            assert all(map(torch.equal, rotate(Q, Q, cos, sin), expected))
        assert len(rotate._angles) == 2
        base.model(input_ids=torch.tensor([[3, 4]]))
        assert not rotate._angles, "at the head they are forgotten"


def widening(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Turn in float32, as some families do."""
    turned = modeling_llama.apply_rotary_pos_emb(*(part.float() for part in (q, k, cos, sin)))
    return tuple(part.to(q.dtype) for part in turned)


def test_a_function_that_widens_half_precision_stays() -> None:
    assert _computes_the_same(modeling_llama.apply_rotary_pos_emb)
    assert not _computes_the_same(widening)


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
