"""Stacks: several adapters side by side have the sum of their ΔW."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.blocks import share_of_zeros
from lorakit.adapters.targets import peft_config
from lorakit.errors import LorakitError
from lorakit.merging.stack import fold, stack

Q, V = (f"model.layers.{{}}.self_attn.{name}_proj" for name in "qv")


def new_adapter(
    modules: list[str],
    rank: int,
    alpha: float,
    *,
    seed: int = 0,
    name: str = "a.safetensors",
    width: int = 6,
    **config: Any,
) -> Adapter:
    draw = np.random.default_rng(seed)
    factors = {
        module: (
            draw.normal(size=(rank, width)).astype(np.float32),
            draw.normal(size=(5, rank)).astype(np.float32),
        )
        for module in modules
    }
    told = peft_config(dict.fromkeys(modules, rank), base="tiny", alpha=alpha)
    return Adapter(tensors_of(factors), {**told, **config}, {}, name)


ONE = new_adapter([Q.format(0), V.format(0)], 4, 8, name="xs.safetensors")
TWO = new_adapter([Q.format(0), Q.format(1)], 2, 3, seed=1, name="wl.safetensors", use_rslora=True)
THREE = new_adapter([V.format(0)], 3, 3, seed=2, name="runs/xs.safetensors")


def test_a_stack_has_the_sum_of_the_deltas() -> None:
    stacked = stack([ONE, TWO, THREE])
    expected: dict[str, Any] = {}
    for adapter in (ONE, TWO, THREE):
        for module in adapter.modules():
            expected[module.name] = expected.get(module.name, 0) + module.delta()
    config = peft_config(stacked.ranks, base="tiny")
    merged = Adapter(tensors_of(fold(stacked.factors, stacked)), config)
    assert {module.name for module in merged.modules()} == expected.keys()
    for module in merged.modules():
        np.testing.assert_allclose(module.delta(), expected[module.name], rtol=1e-5, atol=1e-5)


def test_a_stack_of_one_is_that_adapter() -> None:
    stacked = stack([TWO])
    config = peft_config(stacked.ranks, base="tiny")
    merged = Adapter(tensors_of(fold(stacked.factors, stacked)), config)
    for one, other in zip(merged.modules(), TWO.modules(), strict=True):
        np.testing.assert_allclose(one.delta(), other.delta(), rtol=1e-6, atol=1e-6)


def test_blocks_say_where_each_adapter_lies() -> None:
    stacked = stack([ONE, TWO, THREE])
    assert [block.name for block in stacked.blocks] == ["xs", "wl", "xs-2"]
    assert stacked.ranks == {Q.format(0): 6, V.format(0): 7, Q.format(1): 2}
    places = {
        (block.name, name): (part.offset, part.rank)
        for block in stacked.blocks
        for name, part in block.modules.items()
    }
    assert places == {
        ("xs", Q.format(0)): (0, 4),
        ("xs", V.format(0)): (0, 4),
        ("wl", Q.format(0)): (4, 2),
        ("wl", Q.format(1)): (0, 2),
        ("xs-2", V.format(0)): (4, 3),
    }
    assert stacked.scales(Q.format(0)) == pytest.approx([2.0] * 4 + [3 / 2**0.5] * 2)
    assert stacked.blocks[1].sha256 == TWO.sha256


def test_the_share_of_zeros_is_counted_in_the_block_alone() -> None:
    stacked = stack([ONE, TWO])
    factors = {name: (a.copy(), b.copy()) for name, (a, b) in stacked.factors.items()}
    factors[Q.format(0)][0][4:] = 0  # the rows of `wl`
    shares = [share_of_zeros(block.pairs(factors)) for block in stacked.blocks]
    assert shares == [0.0, 12 / (2 * (12 + 10))]


def test_adapters_of_other_widths_are_refused() -> None:
    other = new_adapter([V.format(0)], 2, 2, name="wide.safetensors", width=7)
    with pytest.raises(LorakitError, match=r"wide.safetensors: .*v_proj is 5×7, .* 5×6"):
        stack([ONE, other])
