"""KnOTS and TSV against dense restatements, which take SVDs of the whole ΔW in float64."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.adapters.adapter import LoraModule
from lorakit.adapters.tensors import Tensor
from lorakit.merging.low_rank import common_basis, polar_factor
from lorakit.merging.methods import METHODS
from lorakit.merging.static import merge_adapters
from lorakit.merging.task_vectors import Part
from lorakit.settings import StaticSettings
from tests.merging.test_static import KINDS, check_same, deltas, new_adapter

Matrix = NDArray[np.float64]

SHAPES = {
    "wide": ((12, 20), ((4, 2.0), (2, 0.5), (3, 1.0))),
    "tall": ((20, 12), ((1, 2.0), (5, 0.25))),
    "ranks that add up to more than the width": ((5, 6), ((4, 1.0), (3, 2.0))),
    "so many that few components remain": ((9, 7), ((3, 1.0), (3, 2.0), (2, 0.3), (1, 1.0))),
}
WEIGHTS = (1.0, -0.5, 0.25, 2.0)


def parts_of(shape: tuple[int, int], adapters: Sequence[tuple[int, float]]) -> list[Part]:
    """Return random parts of one module, of these ranks and scales s."""
    draw = np.random.default_rng(7)
    parts = []
    for number, (rank, scale) in enumerate(adapters):
        a, b = draw.standard_normal((rank, shape[1])), draw.standard_normal((shape[0], rank))
        tensors = Tensor.from_array(a), Tensor.from_array(b)
        parts.append(Part(LoraModule("q", 0, *tensors, scale), WEIGHTS[number], number))
    return parts


def merged(method: str, parts: Sequence[Part], **settings: Any) -> Matrix:
    a, b = METHODS[method].merge(parts, StaticSettings(**settings))
    return b.astype(np.float64) @ a


def nearest(matrix: Matrix, rank: int) -> Matrix:
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    best: Matrix = (u[:, :rank] * values[:rank]) @ vt[:rank]
    return best


def trimmed(values: Matrix, share: float) -> Matrix:
    order = np.argsort(-np.abs(values), axis=None)
    out = np.zeros(values.size)
    kept = order[: int(share * values.size)]
    out[kept] = values.reshape(-1)[kept]
    return out.reshape(values.shape)


def dense_knots(parts: Sequence[Part], share: float) -> Matrix:
    """Concatenate the task vectors, split Σ·Vᵀ among the adapters, and merge that by TIES."""
    changes = [part.weight * part.module.delta() for part in parts]
    u, values, vt = np.linalg.svd(np.concatenate(changes, axis=1), full_matrices=False)
    keep = values > 1e-6 * values[0]
    u, scaled = u[:, keep], values[keep, None] * vt[keep]
    pieces = [trimmed(piece, share) for piece in np.split(scaled, len(parts), axis=1)]
    sign = np.sign(sum(pieces))
    agreeing = [np.where(np.sign(piece) == sign, piece, 0) for piece in pieces]
    count = sum((piece != 0).astype(int) for piece in agreeing)
    merged: Matrix = u @ (sum(agreeing) / np.maximum(count, 1))
    return merged


def dense_tsv(parts: Sequence[Part], share: float) -> Matrix:
    """Keep the 1/N largest components of each ΔW, make them orthogonal by an SVD, and sum."""
    left, middle, right = [], [], []
    for part in parts:
        u, values, vt = np.linalg.svd(part.module.delta(), full_matrices=False)
        most = min(len(values) // len(parts), int((values > 1e-6 * values[0]).sum()))
        k = max(1, int(share * most))
        left.append(u[:, :k])
        middle.append(part.weight * values[:k])
        right.append(vt[:k].T)
    u, v = (whitened(np.concatenate(columns, axis=1)) for columns in (left, right))
    return (u * np.concatenate(middle)) @ v.T


def whitened(columns: Matrix) -> Matrix:
    p, values, qt = np.linalg.svd(columns, full_matrices=False)
    keep = values > 1e-6 * values[0]
    factor: Matrix = p[:, keep] @ qt[keep]
    return factor


RESTATED = {"knots": dense_knots, "tsv": dense_tsv}


@pytest.mark.parametrize("rank", [1, 3, 99])
@pytest.mark.parametrize("share", ["1", "0.5", "0.2"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", RESTATED)
def test_the_merge_is_the_best_fit_of_the_dense_one(
    method: str, shape: str, share: str, rank: int
) -> None:
    parts = parts_of(*SHAPES[shape])
    dense = RESTATED[method](parts, float(share))
    assert np.abs(dense).max() > 0.1
    found = merged(method, parts, density=Decimal(share), rank=rank)
    np.testing.assert_allclose(found, nearest(dense, rank), rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", RESTATED)
def test_without_a_rank_it_is_the_largest_of_the_adapters(method: str) -> None:
    for name, (_, adapters) in SHAPES.items():
        a, b = METHODS[method].merge(parts_of(*SHAPES[name]), StaticSettings())
        assert a.shape[0] == b.shape[1] == max(rank for rank, _ in adapters)


def adapters_of_every_kind() -> list[Any]:
    return [new_adapter(seed=n, name=kind, **KINDS[kind]) for n, kind in enumerate(KINDS)]


@pytest.mark.parametrize("method", RESTATED)
def test_adapters_of_every_kind_are_merged_as_their_dense_changes(method: str) -> None:
    """Conv1D and plain, rslora, patterns of ranks and alphas, modules that some do not have."""
    adapters = adapters_of_every_kind()
    made = merge_adapters(adapters, method, settings=StaticSettings(rank=5))
    assert made.config["fan_in_fan_out"] is True
    expected = {}
    for name in deltas(*adapters):
        sources = [m for adapter in adapters for m in adapter.modules() if m.name == name]
        parts = [Part(module, 1.0, number) for number, module in enumerate(sources)]
        expected[name] = RESTATED[method](parts, 1.0)
    assert len(expected) == 6
    check_same(made, expected)


def test_knots_elects_in_the_common_basis_and_ties_in_that_of_the_weights() -> None:
    parts = parts_of(*SHAPES["wide"])
    assert np.abs(merged("knots", parts, rank=99) - merged("ties", parts, rank=99)).max() > 0.1


def test_adapters_that_share_no_direction_are_summed_by_tsv() -> None:
    """With orthogonal U_i and V_i there is nothing to make orthogonal."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    spans = (slice(0, 2), slice(2, 5))
    parts = []
    for number, span in enumerate(spans):
        tensors = Tensor.from_array(q[span]), Tensor.from_array(3 * q[:, span])
        parts.append(Part(LoraModule("q", 0, *tensors, 0.5), 1.0, number))
    total = sum(part.module.delta() for part in parts)
    np.testing.assert_allclose(merged("tsv", parts, rank=5), total, atol=1e-6)


@pytest.mark.parametrize("method", RESTATED)
def test_an_adapter_merged_with_itself_stays_itself(method: str) -> None:
    part = parts_of((12, 20), ((4, 2.0),))[0]
    twice = [part, Part(part.module, 1.0, 1)]
    np.testing.assert_allclose(merged(method, twice), part.module.delta(), atol=2e-5)


@pytest.mark.parametrize("method", RESTATED)
def test_an_adapter_that_changes_nothing_changes_no_direction(method: str) -> None:
    part = parts_of((12, 20), ((4, 2.0),))[0]
    a, b = part.module.tensor_a, Tensor.from_array(np.zeros((12, 4)))
    idle = Part(LoraModule("q", 0, a, b, 1.0), 1.0, 1)
    np.testing.assert_allclose(merged(method, [part, idle]), part.module.delta(), atol=2e-5)
    assert not merged(method, [idle, idle]).any()


def test_the_common_basis_is_orthonormal_and_holds_every_task_vector() -> None:
    pairs = [(part.module.a, part.module.b) for part in parts_of(*SHAPES["wide"])]
    basis = common_basis(pairs)
    assert basis.shape == (12, 9)
    np.testing.assert_allclose(basis.T @ basis, np.eye(9), atol=1e-12)
    for a, b in pairs:
        np.testing.assert_allclose(basis @ (basis.T @ b), b, atol=1e-5)
        np.testing.assert_allclose(basis @ (basis.T @ b @ a), b @ a, atol=1e-4)


def test_the_polar_factor_is_the_nearest_matrix_with_orthonormal_columns() -> None:
    draw = np.random.default_rng(1)
    matrix = draw.standard_normal((9, 4))
    factor = polar_factor(matrix)
    np.testing.assert_allclose(factor.T @ factor, np.eye(4), atol=1e-12)
    stretch = factor.T @ matrix  # symmetric and positive: Higham's condition
    np.testing.assert_allclose(stretch, stretch.T, atol=1e-12)
    assert np.linalg.eigvalsh(stretch).min() > 0
