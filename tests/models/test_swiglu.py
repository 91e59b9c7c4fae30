"""Gated MLPs that store less give what transformers' own give, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from lorakit.models.swiglu import fused_swiglu, fusible_mlps
from tests.support.models import open_base, save_model


def mlps_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, list[torch.nn.Module]]:
    model = open_base(name, dtype).model
    return model, [module for module in model.modules() if type(module).__name__.endswith("MLP")]


def value_and_gradient(mlp: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    given = x.clone().requires_grad_(True)
    value = mlp(given)
    value.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype))
    assert given.grad is not None
    return value.detach(), given.grad


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_mlp_to_the_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, mlps = mlps_of(save_model(tmp_path, family), dtype)
    x = torch.randn(2, 5, model.config.hidden_size).to(dtype)
    plain = value_and_gradient(mlps[0], x)
    with fused_swiglu(model):
        assert all("forward" in vars(mlp) for mlp in mlps)
        assert not list(fusible_mlps(model)), "what is replaced is not replaced again"
        fused = value_and_gradient(mlps[0], x)
    assert all(map(torch.equal, fused, plain))
    assert not any("forward" in vars(mlp) for mlp in mlps)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "phi", "gpt2"])
def test_an_mlp_with_another_activation_or_one_projection_stays(
    family: str, tmp_path: Path
) -> None:
    model, mlps = mlps_of(save_model(tmp_path, family))
    assert mlps
    assert not list(fusible_mlps(model))


Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OTHERS: dict[str, Compute] = {
    "scaled": lambda gate, up: 0.5 * silu(gate) * up,
    "of bounded gates": lambda gate, up: silu(gate.clamp(max=10)) * up,
    "widened": lambda gate, up: (silu(gate.float()) * up.float()).to(gate.dtype),
}


@pytest.mark.parametrize("compute", OTHERS.values(), ids=OTHERS.keys())
def test_an_mlp_that_computes_something_else_stays(llama: str, compute: Compute) -> None:
    model, mlps = mlps_of(llama)

    class Other(type(mlps[0])):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            passed: torch.Tensor = self.down_proj(compute(self.gate_proj(x), self.up_proj(x)))
            return passed

    mlps[0].__class__ = Other
    assert list(fusible_mlps(model)) == mlps[1:]


def test_of_mlps_that_a_number_tells_apart_each_is_tried(llama: str) -> None:
    model, mlps = mlps_of(llama)

    class Bounded(type(mlps[0])):  # type: ignore[misc]
        limit: float

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.gate_proj(x).clamp(max=self.limit)
            passed: torch.Tensor = self.down_proj(silu(gate) * self.up_proj(x))
            return passed

    for mlp, limit in zip(mlps, (float("inf"), 10.0, 10.0, float("inf")), strict=False):
        mlp.__class__, mlp.limit = Bounded, limit  # type: ignore[assignment]
    bounded = [mlp for mlp in mlps if getattr(mlp, "limit", 0.0) == 10.0]
    assert bounded
    assert list(fusible_mlps(model)) == [mlp for mlp in mlps if mlp not in bounded]


def test_an_mlp_with_weights_of_another_kind_stays(llama: str) -> None:
    model, mlps = mlps_of(llama)
    mlps[0].register_buffer("scale", torch.ones(1))
    mlps[1].norm = torch.nn.Identity()
    assert not {mlps[0], mlps[1]} & set(fusible_mlps(model))


def test_a_third_less_is_stored(llama: str) -> None:
    model, mlps = mlps_of(llama)
    x = torch.randn(2, 5, model.config.hidden_size).requires_grad_(True)
    inner = 2 * 5 * model.config.intermediate_size

    def stored() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept.append(mlps[0](x))
        return sum(size == inner for size in sizes.values())

    kept: list[torch.Tensor] = []
    model.requires_grad_(False)
    assert stored() == 3
    with fused_swiglu(model):
        assert stored() == 2
