"""Low-rank fits against the dense SVD's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lorakit.adapters.tensors import FloatArray
from lorakit.merging.low_rank import fit, numerical_rank, product_svd, refit


def draw(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def error(matrix: NDArray[Any], a: FloatArray, b: FloatArray) -> float:
    return float(np.linalg.norm(matrix.astype(np.float64) - b.astype(np.float64) @ a))


def least_error(matrix: NDArray[Any], rank: int) -> float:
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return float(np.sqrt(np.sum(values[rank:] ** 2)))


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers()
)
@settings(max_examples=40, deadline=None)
def test_a_refit_has_the_error_of_the_dense_svd(
    rows: int, columns: int, wide: int, rank: int, seed: int
) -> None:
    a, b = draw(wide, columns, seed=seed % 99), draw(rows, wide, seed=seed % 97)
    matrix = b.astype(np.float64) @ a
    small_a, small_b = refit(a, b, rank)
    assert small_a.shape == (min(rank, wide, rows, columns), columns)
    assert small_a.dtype == small_b.dtype == np.float32
    size = float(np.linalg.norm(matrix))
    assert error(matrix, small_a, small_b) <= least_error(matrix, rank) + 1e-6 * size


def test_without_a_rank_a_refit_keeps_all_there_is_and_no_more() -> None:
    a, b = draw(3, 20), draw(10, 3)
    twice_a, twice_b = refit(np.concatenate([a, a]), np.concatenate([b, b], axis=1))
    assert twice_a.shape[0] == 3
    np.testing.assert_allclose(twice_b @ twice_a, 2 * b @ a, atol=1e-5)
    none_a, none_b = refit(a, 0 * b)
    assert (none_a.shape, none_b.shape) == ((1, 20), (10, 1))
    assert not (none_b @ none_a).any()


@pytest.mark.parametrize("size", [1e-4, 1])  # of the second adapter, beside the first
@pytest.mark.parametrize("distance", [0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1])
def test_a_product_of_factors_is_decomposed_however_close_two_adapters_are(
    distance: float, size: float
) -> None:
    a, b = draw(5, 90).astype(np.float64), draw(70, 5, seed=1).astype(np.float64)
    other_a, other_b = a + distance * draw(5, 90, seed=2), b + distance * draw(70, 5, seed=3)
    stacked_a, stacked_b = np.concatenate([a, other_a]), np.hstack([b, size * other_b])
    svd = product_svd(stacked_a, stacked_b)
    dense = np.linalg.svd(stacked_b @ stacked_a, compute_uv=False)[:10]
    assert np.abs(svd.values - dense).max() <= 1e-9 * dense[0]
    kept = numerical_rank(svd.values)
    assert kept == numerical_rank(dense)
    left, right = svd.left(kept), svd.right(kept)
    np.testing.assert_allclose(left.T @ left, np.eye(kept), atol=1e-8)
    np.testing.assert_allclose(right @ right.T, np.eye(kept), atol=1e-8)
    np.testing.assert_allclose(
        (left * svd.values[:kept]) @ right, stacked_b @ stacked_a, atol=1e-7 * dense[0]
    )


def test_adapters_of_different_sizes_need_no_qr(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a QR takes five times as long")

    a, b = draw(12, 90), draw(70, 12, seed=1)
    b[:, :4] *= 1e-6
    matrix = b.astype(np.float64) @ a
    least = least_error(matrix, 3)
    monkeypatch.setattr(np.linalg, "qr", refuse)
    assert error(matrix, *refit(a, b, 3)) <= least + 1e-6 * float(np.linalg.norm(matrix))


def test_both_factors_of_a_refit_have_one_size() -> None:
    a, b = refit(100 * draw(4, 20), draw(10, 4), 3)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 9), (150, 400), (400, 150)])
@pytest.mark.parametrize("kind", ["noise", "falling", "sparse"])
def test_a_dense_fit_is_within_a_thousandth_of_the_best(shape: tuple[int, int], kind: str) -> None:
    matrix = draw(*shape)
    if kind == "falling":
        matrix *= np.arange(1, shape[1] + 1, dtype=np.float32) ** -1.0
    if kind == "sparse":
        matrix = draw(shape[0], 8) @ draw(8, shape[1], seed=1)
        matrix[np.abs(matrix) < 2] = 0
    a, b = fit(matrix, 4)
    assert (a.shape, b.shape) == ((4, shape[1]), (shape[0], 4))
    assert error(matrix, a, b) <= least_error(matrix, 4) * 1.001


def test_a_dense_fit_of_a_low_rank_matrix_is_that_matrix() -> None:
    matrix = draw(300, 4) @ draw(4, 200, seed=1)
    a, b = fit(matrix, 6)
    assert error(matrix, a, b) < 1e-6 * np.linalg.norm(matrix)


def test_a_dense_fit_is_the_same_each_time() -> None:
    matrix = draw(150, 400)
    assert all(np.array_equal(x, y) for x, y in zip(fit(matrix, 4), fit(matrix, 4), strict=True))
