"""Which layers keep their LoRA, by importances that were measured somehow."""

from __future__ import annotations

from decimal import Decimal

import pytest

from lorakit.boundary.layer_choice import choose_layers, layer_shares
from lorakit.errors import LorakitError
from lorakit.settings import LayerChoiceSettings

SHARES = {0: 0.2, 1: 0.05, 2: 0.4, 3: 0.2, 4: 0.15}


def name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.{projection}"


def test_a_layers_share_is_the_mean_of_its_projections_shares() -> None:
    shares = layer_shares(
        {
            name(0, "self_attn.q_proj"): 1.0,
            name(1, "self_attn.q_proj"): 3.0,
            name(0, "mlp.q_proj"): 600.0,
            name(2, "mlp.q_proj"): 200.0,
            "lm_head": 1e9,
        }
    )
    assert shares == {0: (0.25 + 0.75) / 2, 1: 0.75 / 2, 2: 0.25 / 2}


def test_a_projection_that_changes_nothing_counts_for_nothing() -> None:
    modules = {name(0, "q"): 1.0, name(1, "q"): 1.0, name(0, "v"): 0.0, name(2, "v"): 0.0}
    assert layer_shares(modules) == {0: 0.5, 1: 0.5, 2: 0.0}


@pytest.mark.parametrize("modules", [{name(0, "q"): 0.0}, {"lm_head": 1.0}], ids=str)
def test_an_adapter_that_changes_nothing_is_refused(modules: dict[str, float]) -> None:
    with pytest.raises(LorakitError, match="changes anything on the data; use the base model"):
        layer_shares(modules)


@pytest.mark.parametrize(
    ("share", "layers"),
    [
        ("0.001", (2,)),
        ("0.2", (2,)),
        ("0.29", (2,)),
        ("0.3", (0, 2)),
        ("0.5", (0, 2, 3)),
        ("0.6", (0, 2, 3)),
        ("0.8", (0, 2, 3, 4)),
        ("1", (0, 1, 2, 3, 4)),
    ],
)
def test_the_share_is_that_of_the_layers_and_the_lower_of_equals_stays(
    share: str, layers: tuple[int, ...]
) -> None:
    assert choose_layers(SHARES, LayerChoiceSettings("output", share=Decimal(share))) == layers


@pytest.mark.parametrize("boundary", range(1, 31))
def test_a_boundary_of_30_written_with_two_digits_keeps_as_many_layers(boundary: int) -> None:
    share = Decimal(f"{boundary / 30:.2f}")
    shares = dict.fromkeys(range(30), 1 / 30)
    chosen = choose_layers(shares, LayerChoiceSettings("output", share=share))
    assert chosen == tuple(range(boundary))


@pytest.mark.parametrize(
    ("threshold", "layers"),
    [
        ("0.01", (2,)),
        ("0.4", (2,)),
        ("0.41", (0, 2)),
        ("0.8", (0, 2, 3)),
        ("0.9", (0, 2, 3, 4)),
        ("0.95", (0, 2, 3, 4)),
        ("1", (0, 1, 2, 3, 4)),
    ],
)
def test_the_threshold_is_reached_by_as_few_layers_as_can_be(
    threshold: str, layers: tuple[int, ...]
) -> None:
    settings = LayerChoiceSettings("output", threshold=Decimal(threshold))
    assert choose_layers(SHARES, settings) == layers


def test_shares_that_add_up_to_1_but_for_rounding_reach_a_threshold_of_1() -> None:
    shares = layer_shares({name(layer, "q"): 0.1 for layer in range(10)})
    shares[10] = 0.0
    settings = LayerChoiceSettings("output", threshold=Decimal(1))
    assert choose_layers(shares, settings) == tuple(range(10))
