"""The one function of a LoRA layer in training against PEFT's own forward and backward."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.models.lora import default_targets, factors, inject, pick_modules, set_rank_scales
from lorakit.training.lora_step import (
    _Copies,
    _Copy,
    _LoraSum,
    _mask_of_bits,
    _plain_mask,
    dropout_mask,
    fused_forward,
    lean_passes,
)
from tests.support.lora import logits_and_gradients
from tests.support.models import open_base, save_model


def lora_on(name: str, dtype: torch.dtype, *, dropout: float = 0.0, scaled: bool = False) -> Any:
    base = open_base(name, dtype)
    modules = pick_modules(base, default_targets(base)[0], None)
    layers = inject(base, dict.fromkeys(modules, 4), alpha=6, dropout=dropout)
    torch.manual_seed(1)
    for layer in layers.values():
        for weight in factors(layer):
            torch.nn.init.normal_(weight, std=0.2)
            weight.requires_grad_(True)
        if scaled:
            set_rank_scales(layer, torch.tensor([2.0, 0.5, 0.5, 1.25]))
        layer.lora_dropout.train(dropout > 0)
    return base, layers


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_and_gradients_are_those_of_pefts_layers(
    family: str, scaled: bool, tmp_path: Path
) -> None:
    base, layers = lora_on(save_model(tmp_path, family), torch.float32, scaled=scaled)
    plain = logits_and_gradients(base, layers)
    with fused_forward(layers):
        found = logits_and_gradients(base, layers)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    again = logits_and_gradients(base, layers)  # and PEFT's layers are as they were
    for one, other in zip(again, plain, strict=True):
        assert torch.equal(one, other)


def test_dropout_is_pefts_with_our_mask(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, layers = lora_on(llama, torch.float32, dropout=0.4)
    with fused_forward(layers):
        found = logits_and_gradients(base, layers)
        other_draw = logits_and_gradients(base, layers, seed=6)
    monkeypatch.setattr(
        torch.nn.Dropout, "forward", lambda self, x: x * dropout_mask(x, self.p) / (1 - self.p)
    )
    for one, other in zip(found, logits_and_gradients(base, layers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], other_draw[0], rtol=1e-3)


@pytest.mark.parametrize("draw", [_mask_of_bits, _plain_mask], ids=["CPU", "other devices"])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.95])
def test_a_mask_drops_its_share_of_values_each_by_itself(share: float, draw: Any) -> None:
    torch.manual_seed(3)
    rows, columns = 999, 1001  # not a multiple of the four values of a draw
    kept = draw(torch.empty(rows, columns), share)
    assert (kept.shape, kept.dtype) == ((rows, columns), torch.uint8)
    assert set(kept.unique().tolist()) == {0, 1}
    dropped = 1 - kept.double()
    expected = share * dropped.numel()
    assert abs(float(dropped.sum()) - expected) < 5 * (expected * (1 - share)) ** 0.5
    for step in (1, 2, 3, 4, columns):  # neighbours, those of one draw too, go independently
        both = dropped.flatten()[:-step] * dropped.flatten()[step:]
        variance = share**2 * (1 - share**2) + 2 * share**3 * (1 - share)  # pairs share values
        expected = share**2 * both.numel()
        assert abs(float(both.sum()) - expected) < 5 * (variance * both.numel()) ** 0.5


@pytest.mark.parametrize("share", [1e-6, 1 - 1e-6])
def test_a_share_near_its_ends_drops_almost_nothing_or_almost_all(share: float) -> None:
    assert abs(float(dropout_mask(torch.empty(10_000), share).double().mean()) - (1 - share)) < 1e-3


def test_a_bfloat16_base_is_added_to_in_float32(llama: str) -> None:
    base, layers = lora_on(llama, torch.bfloat16)
    plain = logits_and_gradients(base, layers)
    with fused_forward(layers):
        found = logits_and_gradients(base, layers)
    for one, other in zip(found, plain, strict=True):
        assert float((one - other).norm()) <= 0.03 * float(other.norm())


def test_without_gradients_pefts_own_layers_compute_and_their_hooks_see_it(llama: str) -> None:
    base, layers = lora_on(llama, torch.float32)
    seen: list[str] = []
    for name, layer in layers.items():
        layer.lora_A["default"].register_forward_hook(lambda *_, name=name: seen.append(name))
    with fused_forward(layers), torch.no_grad():
        base.model(input_ids=torch.tensor([[3, 4, 5]]))
    assert sorted(seen) == sorted(layers)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_gradient_is_the_numerical_one(share: float) -> None:
    draw = torch.Generator().manual_seed(0)
    plain, x, a, b, scales = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((2, 3, 6), (2, 3, 5), (4, 5), (6, 4), (4,))
    )

    def added(*given: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        found: torch.Tensor = _LoraSum.apply(*given, scales, share, _Copies())  # type: ignore[no-untyped-call]
        return found

    given = [tensor.requires_grad_(True) for tensor in (plain, x, a, b)]
    assert torch.autograd.gradcheck(added, given)


def count_misses(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a list that every input is put into that `_Copies` finds to be another than before."""
    misses: list[torch.Tensor] = []
    plain = _Copy.serves

    def serves(copy: _Copy, x: torch.Tensor, dtype: torch.dtype) -> bool:
        found = plain(copy, x, dtype)
        misses.extend([] if found else [x])
        return found

    monkeypatch.setattr(_Copy, "serves", serves)
    return misses


def test_projections_of_one_input_share_its_copy_and_compute_the_same(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, layers = lora_on(llama, torch.bfloat16, dropout=0.3)
    inputs = len(layers) // 2  # q and v read the same
    with monkeypatch.context() as patched, fused_forward(layers):
        misses = count_misses(patched)
        shared = logits_and_gradients(base, layers)
    assert len(misses) == 2 * (inputs - 1), "forwards and backwards, but for the first"
    with monkeypatch.context() as patched, fused_forward(layers):
        patched.setattr(_Copies, "of", lambda _, x, dtype: x.to(dtype))
        alone = logits_and_gradients(base, layers)
    for one, other in zip(shared, alone, strict=True):
        assert torch.equal(one, other)


def test_a_copy_is_of_what_is_asked_for() -> None:
    copies = _Copies()
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    copy = copies.of(x, torch.float32)
    assert torch.equal(copy, x.float())
    assert copies.of(x.detach(), torch.float32) is copy, "the same memory"
    for other in (x[:1], x[1:], x.t(), x.clone()):
        assert torch.equal(copies.of(other, torch.float32), other.float())
        assert torch.equal(copies.of(x, torch.float32), x.float())
    assert copies.of(x, torch.float64).dtype == torch.float64
    x.add_(1)
    assert torch.equal(copies.of(x, torch.float64), x.double()), "it has been changed"
    wide = x.double()
    assert copies.of(wide, torch.float64) is wide


def test_no_copy_and_no_graph_is_kept_where_a_pass_fails(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, layers = lora_on(llama, torch.bfloat16)
    kept: list[weakref.ref[torch.Tensor]] = []
    plain = _Copies.of

    def noting(copies: _Copies, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        kept.append(weakref.ref(x))
        return plain(copies, x, dtype)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(_Copies, "of", noting)
    base.model.get_output_embeddings().register_forward_pre_hook(fail)
    with lean_passes(base.model, layers):
        with pytest.raises(RuntimeError, match="say"):
            base.model(input_ids=torch.tensor([[3, 4, 5]]))
        gc.collect()
        assert len(kept) == len(layers)
        assert not any(reference() is not None for reference in kept)
