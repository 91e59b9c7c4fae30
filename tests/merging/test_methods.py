"""The methods without data, module by module: cases worked out by hand, and what must hold."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.adapters.adapter import LoraModule
from lorakit.adapters.tensors import FloatArray, Tensor
from lorakit.merging import task_vectors
from lorakit.merging.methods import METHODS
from lorakit.merging.task_vectors import (
    Part,
    combine_parts,
    dropping,
    elected_mean,
    total,
    trimming,
)
from lorakit.settings import StaticSettings

ONE = [[4, -1], [0.5, -3]]
TWO = [[2, 5], [-1, -2]]


def part(delta: Any, weight: float = 1.0, adapter: int = 0, name: str = "q") -> Part:
    """Return a part whose ΔW is `delta`: A is the identity and s is ½."""
    values = np.asarray(delta, np.float32)
    tensors = (Tensor.from_array(np.eye(values.shape[1])), Tensor.from_array(2 * values))
    return Part(LoraModule(name, None, *tensors, scale=0.5), weight, adapter)


def merged(method: str, parts: list[Part], **given: Any) -> FloatArray:
    rank = max(p.module.rank for p in parts)
    chosen = StaticSettings(**{"rank": rank, **given})
    a, b = METHODS[method].merge(parts, chosen)
    return b @ a


HALF = Decimal("0.5")  # of four parameters: two are kept


@pytest.mark.parametrize(
    ("method", "weights", "expected"),
    [
        ("ties", (1, 1), [[3, 5], [0, -3]]),  # of TWO's ±2 the first is kept
        ("ties", (2, 2), [[6, 10], [0, -6]]),
        ("ties", (1, -2), [[0, -10], [0, -3]]),  # 4 − 4 elects no sign
        ("ties", (1, -1), [[4, -5], [0, -3]]),
        ("magnitude-prune", (1, 1), [[6, 5], [0, -3]]),
        ("magnitude-prune", (1, -2), [[0, -10], [0, -3]]),
    ],
)
def test_cases_worked_out_by_hand(
    method: str, weights: tuple[float, float], expected: list[list[float]]
) -> None:
    parts = [part(ONE, weights[0], 0), part(TWO, weights[1], 1)]
    np.testing.assert_allclose(merged(method, parts, density=HALF), expected, atol=1e-5)


def test_ties_without_trimming_elects_and_means_over_those_that_agree() -> None:
    three = [part(ONE), part(TWO), part([[1, -9], [1, 1]])]
    expected = [[7 / 3, -5], [0.75, -2.5]]
    np.testing.assert_allclose(merged("ties", three), expected, atol=1e-5)


def test_the_mean_counts_no_zeros() -> None:
    assert elected_mean(
        [np.array([[2, 0]], np.float32), np.zeros((1, 2), np.float32)]
    ).tolist() == [[2, 0]]


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 999), weight=st.sampled_from([1.0, 0.3, -2.0]))
@settings(max_examples=5, deadline=None)
def test_one_adapter_gives_its_own_change_times_its_weight(
    method: str, seed: int, weight: float
) -> None:
    delta = np.random.default_rng(seed).normal(size=(5, 3))
    np.testing.assert_allclose(merged(method, [part(delta, weight)]), weight * delta, atol=1e-5)


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "dare-linear", "magnitude-prune"])
def test_at_density_1_these_are_the_weighted_sum(method: str) -> None:
    parts = [part(ONE, 0.5), part(TWO, -0.25, 1)]
    expected = 0.5 * np.array(ONE) - 0.25 * np.array(TWO)
    np.testing.assert_allclose(merged(method, parts), expected, atol=1e-6)


def test_the_order_of_the_adapters_does_not_matter_to_ties() -> None:
    parts = [part(ONE), part(TWO, 0.7, 1)]
    one, other = (merged("ties", each, density=HALF) for each in (parts, parts[::-1]))
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("density", ["0.29", "0.5", "0.01", "1", "0.001"])
@pytest.mark.parametrize("values", ["equal", "random", "two sizes"])
def test_exactly_the_share_is_kept_ties_or_not(density: str, values: str) -> None:
    delta = np.random.default_rng(0).normal(size=(10, 10))
    delta = {"equal": np.ones((10, 10)), "random": delta, "two sizes": np.sign(delta) + 3}[values]
    kept = combine_parts([part(delta)], trimming(Decimal(density)), total)
    assert np.count_nonzero(kept) == int(100 * Decimal(density))
    assert np.abs(kept[kept != 0]).min(initial=9) >= np.abs(delta[kept == 0]).max(initial=0) - 1e-6


def test_dropping_keeps_the_share_and_the_mean() -> None:
    delta = np.full((400, 300), 2.0)
    kept = combine_parts([part(delta)], dropping(Decimal("0.25"), seed=0), total)
    assert set(np.unique(kept)) == {0.0, 8.0}
    assert np.mean(kept != 0) == pytest.approx(0.25, abs=0.01)


def test_the_draws_depend_on_seed_module_and_adapter() -> None:
    def drop(seed: int = 0, **given: Any) -> bytes:
        return combine_parts(
            [part(np.ones((20, 20)), **given)], dropping(HALF, seed), total
        ).tobytes()

    assert drop() == drop()
    assert len({drop(), drop(seed=1), drop(adapter=1), drop(name="v")}) == 4


@pytest.mark.parametrize("method", ["ties", "dare-ties", "dare-linear", "magnitude-prune"])
def test_the_size_of_the_blocks_does_not_matter(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    parts = [part(np.round(draw.normal(size=(9, 5))), 1, i) for i in range(3)]
    whole = merged(method, parts, density=HALF)
    monkeypatch.setattr(task_vectors, "_BLOCK", 10)
    assert len(list(task_vectors.row_blocks(parts[0]))) == 5
    np.testing.assert_array_equal(merged(method, parts, density=HALF), whole)


def test_every_method_says_what_it_is_and_reads_only_settings_there_are() -> None:
    for method in METHODS.values():
        assert method.help
        assert set(method.settings) <= set(vars(StaticSettings()))
