"""Which modules the configs that lorakit makes select."""

from __future__ import annotations

import pytest

from lorakit.adapters.targets import short_targets

Q, K, V = (f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv")
THERE = [name.format(layer) for layer in range(3) for name in (Q, K, V)]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([n for n in THERE if "k_" not in n], (["q_proj", "v_proj"], None)),
        ([n for n in THERE if "q_" in n and ".2." not in n], (["q_proj"], [0, 1])),
        ([Q.format(0), V.format(1)], ([Q.format(0), V.format(1)], None)),
    ],
    ids=["every layer", "some layers", "no pattern"],
)
def test_targets_are_short_where_that_selects_no_other_module(
    modules: list[str], expected: tuple[list[str], list[int] | None]
) -> None:
    assert short_targets(modules, THERE) == expected
