"""Norms computed by one kernel give what transformers' own operations give."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
import transformers.models as families

from lorakit.models.base import Base
from lorakit.models.loading import load_base
from lorakit.models.norms import fuse_norms_, fused_norms, fusible_norms, lean_norms
from tests.support.devices import here
from tests.support.models import open_base, save_model

IDS = torch.arange(3, 20)[None]


def with_random_norms(base: Base) -> Base:
    torch.manual_seed(0)
    for module in base.model.modules():
        if "Norm" in type(module).__name__:
            torch.nn.init.normal_(module.weight)
    return base


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_model_gives_the_same_logits(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = with_random_norms(open_base(save_model(tmp_path, family), dtype)).model
    expected = model(IDS).logits
    fuse_norms_(model)
    assert torch.equal(model(IDS).logits, expected)  # on a CPU, to the bit
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    assert norms == list(fusible_norms(model))
    assert all("forward" in vars(norm) for norm in norms)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_model_on_a_gpu_is_near_the_plain_one(llama: str, dtype: torch.dtype) -> None:
    base = with_random_norms(load_base(llama, device=here("cuda"), dtype=dtype))
    fused = base.model(IDS.cuda()).logits
    for norm in list(fusible_norms(base.model)):
        assert vars(norm).pop("forward")
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(fused, base.model(IDS.cuda()).logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_norm_that_computes_something_else_stays(family: str, tmp_path: Path) -> None:
    model = open_base(save_model(tmp_path, family)).model
    assert not list(fusible_norms(model))


def test_a_gated_norm_stays() -> None:
    norm = families.mamba2.modeling_mamba2.MambaRMSNormGated(8, 8)
    assert not list(fusible_norms(torch.nn.ModuleList([norm])))


def test_a_norm_that_rounds_otherwise_stays() -> None:
    half = families.olmo2.modeling_olmo2.Olmo2RMSNorm(64).to(torch.bfloat16)
    assert not list(fusible_norms(torch.nn.ModuleList([half])))
    assert list(fusible_norms(torch.nn.ModuleList([half.to(torch.float32)])))


def test_a_copy_of_a_fused_norm_has_a_weight_of_its_own(llama: str) -> None:
    model = open_base(llama).model
    fuse_norms_(model)
    norm = next(iter(fusible_norms(model)))
    other, x = copy.deepcopy(norm), torch.randn(2, len(norm.get_parameter("weight")))
    before = norm(x)
    torch.nn.init.zeros_(other.get_parameter("weight"))
    assert not other(x).any()
    assert torch.equal(norm(x), before)


def test_the_gradient_is_that_of_the_plain_norm(llama: str) -> None:
    model = with_random_norms(open_base(llama)).model
    norm = next(iter(fusible_norms(model)))
    x = torch.randn(5, len(norm.get_parameter("weight")))
    gradients = []
    for fused in (False, True):
        if fused:
            fuse_norms_(model)
        given = x.clone().requires_grad_(True)
        norm(given).square().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("width", [8, 24, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_training_values_and_gradients_are_those_of_the_plain_norm_to_the_bit(
    dtype: torch.dtype, width: int
) -> None:
    torch.manual_seed(0)
    norm = families.llama.modeling_llama.LlamaRMSNorm(width).to(dtype).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(2, 9, width) * torch.tensor([1e-3, 1.0, 30.0]).repeat(3)[:, None]).to(dtype)
    grad = torch.randn(2, 9, width).to(dtype)
    found = []
    for context in (contextlib.nullcontext(), fused_norms(torch.nn.ModuleList([norm]))):
        given = x.clone().requires_grad_(True)
        with context:
            normed = norm(given)
            normed.backward(grad)
        assert given.grad is not None
        found.append((normed, given.grad))
    assert all(map(torch.equal, *found))


def test_only_in_training_norms_are_one_function(llama: str) -> None:
    model = with_random_norms(open_base(llama)).model.requires_grad_(False)
    x = torch.randn(5, model.config.hidden_size)
    norm = next(iter(fusible_norms(model)))
    with fused_norms(model):
        assert norm(x).grad_fn is None
        assert "_Norm" in type(norm(x.clone().requires_grad_(True)).grad_fn).__name__
        with torch.no_grad():
            assert norm(x.clone().requires_grad_(True)).grad_fn is None
        norm.get_parameter("weight").requires_grad_(True)
        norm(x).sum().backward()
        assert norm.get_parameter("weight").grad is not None
    assert "forward" not in vars(norm)


def test_a_norm_with_another_gradient_stays_as_it_is_in_training() -> None:
    class RMSNormOfPowers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(24)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            root = torch.pow(x.pow(2).mean(-1, keepdim=True) + self.eps, -0.5)
            return self.weight * (x * root)

    model = torch.nn.ModuleList([RMSNormOfPowers()])
    plain = families.llama.modeling_llama.LlamaRMSNorm(24)
    assert not list(lean_norms(model))
    assert list(lean_norms(torch.nn.ModuleList([plain])))


def test_a_block_within_a_block_replaces_nothing(llama: str) -> None:
    model = open_base(llama).model
    with fused_norms(model):
        inside = [vars(norm)["forward"] for norm in fusible_norms(model)]
        with fused_norms(model):
            assert [vars(norm)["forward"] for norm in fusible_norms(model)] == inside
        assert all("forward" in vars(norm) for norm in fusible_norms(model))
    assert not any("forward" in vars(norm) for norm in fusible_norms(model))
