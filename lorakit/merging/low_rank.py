"""Low-rank fits: two factors whose product is nearest to a matrix or to a product of factors.

Only matrices are known here. A product of factors is never formed: orthonormal bases of both and an
SVD of the small core suffice. A dense matrix is fitted by a randomised block Krylov method.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorakit.adapters.tensors import FloatArray, Pair

Matrix = NDArray[np.float64]

_SPARE = 10  # directions beyond the rank that a Krylov block carries
_STEPS = 6
_WELL_CONDITIONED = 5e3  # its square times the spacing of float64 is below that of float32
_NEGLIGIBLE = 2.0**-24  # half the spacing of float32: storing the factors changes ΔW by as much


class ProductSvd(NamedTuple):
    """The singular value decomposition of a product B·A: (Y_B·U) · values · (V·Y_A)."""

    y_b: Matrix
    u: Matrix
    values: Matrix
    v: Matrix
    y_a: Matrix

    def left(self, count: int) -> Matrix:
        """Return the first left singular vectors as columns, (d_out × count)."""
        vectors: Matrix = self.y_b @ self.u[:, :count]
        return vectors

    def right(self, count: int) -> Matrix:
        """Return the first right singular vectors as rows, (count × d_in)."""
        vectors: Matrix = self.v[:count] @ self.y_a
        return vectors


def product_svd(a: FloatArray | Matrix, b: FloatArray | Matrix) -> ProductSvd:
    """Return the decomposition of B·A, by orthonormal bases of both and an SVD of the small core.

    A is (R × d_in), B (d_out × R). In float64; time and memory grow with R, never with d_in·d_out.
    """
    y_b, t_b, r_b = _orthonormal(b.astype(np.float64))
    y_a, t_a, r_a = _orthonormal(a.astype(np.float64).T)
    u, values, vt = np.linalg.svd(r_b @ r_a.T)
    return ProductSvd(y_b, t_b @ u, values, vt @ t_a.T, y_a.T)


def _orthonormal(x: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Return Y, T and R with X = (Y·T)·R, where the columns of Y·T are orthonormal.

    X is (d × R). Of the Cholesky factor of XᵀX = L·Lᵀ where X is well-conditioned: Y = X, T = L⁻ᵀ,
    R = Lᵀ, which needs a fifth of the time of a QR. Its error grows with the square of the
    condition number, so that any other X, with dependent columns above all, gets a QR, and T = 1.
    """
    factor = _cholesky(x)
    if factor is None:
        q, r = np.linalg.qr(x)
        return q, np.eye(q.shape[1]), r
    lower, inverse = factor
    return x, inverse.T, lower.T


def _cholesky(x: Matrix) -> tuple[Matrix, Matrix] | None:
    """Return L, with XᵀX = L·Lᵀ, and L⁻¹; None unless they make X orthonormal to about 10⁻⁸.

    What counts is the condition number of X with columns of length 1, of which the product of the
    two Frobenius norms is an upper bound (van der Sluis, 1969; Higham 2002, theorem 10.5).
    """
    if len(x) < 2 * x.shape[1]:  # a QR is as quick
        return None
    gram: Matrix = x.T @ x
    lengths = np.sqrt(np.diagonal(gram))
    try:
        lower: Matrix = np.linalg.cholesky(gram).astype(np.float64, copy=False)
        inverse: Matrix = np.linalg.inv(lower).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return None
    condition = np.linalg.norm(lower / lengths[:, None]) * np.linalg.norm(inverse * lengths)
    return (lower, inverse) if condition <= _WELL_CONDITIONED else None


def refit(
    a: FloatArray | Matrix,
    b: FloatArray | Matrix,
    rank: int | None = None,
    *,
    energy: Decimal | None = None,
) -> Pair:
    """Return the factors of the matrix of rank `rank` nearest to B·A, in float32.

    A is (R × d_in), B (d_out × R). Nearest in the Frobenius norm (Eckart and Young, 1936). With
    `energy`, it is the lowest rank that keeps that share of ‖B·A‖², and at most `rank`; without
    both, the lowest whose error float32 cannot tell from zero. Each factor takes the root of every
    singular value, so that both are of similar size.
    """
    svd = product_svd(a, b)
    lowest = numerical_rank(svd.values) if energy is None else energy_rank(svd.values, energy)
    needed = lowest if rank is None or energy is not None else len(svd.values)
    keep = needed if rank is None else min(rank, needed)
    root = np.sqrt(svd.values[:keep])
    return _pair(root[:, None] * svd.right(keep), svd.left(keep) * root)


def common_basis(pairs: Sequence[Pair]) -> Matrix:
    """Return the left singular vectors of [B_1·A_1 | … | B_N·A_N], (d_out × R) with R ≤ Σ r_i.

    Those of singular values that float32 cannot tell from zero are left out. By QR of the stacked B
    and of each A_iᵀ and an SVD of the core [R_B,1·R_A,1ᵀ | …], of at most Σ r_i rows and columns.
    """
    q_b, r_b = np.linalg.qr(np.concatenate([b for _, b in pairs], axis=1).astype(np.float64))
    r_a = [np.linalg.qr(a.T.astype(np.float64))[1] for a, _ in pairs]
    starts = np.cumsum([b.shape[1] for _, b in pairs])[:-1]
    columns = np.split(r_b, starts, axis=1)
    core = np.concatenate([c @ r.T for c, r in zip(columns, r_a, strict=True)], axis=1)
    u, values, _ = np.linalg.svd(core, full_matrices=False)
    basis: Matrix = q_b @ u[:, : numerical_rank(values)]
    return basis


def polar_factor(matrix: Matrix) -> Matrix:
    """Return P·Qᵀ of the decomposition P·D·Qᵀ of a matrix (d × n), without those of D ≈ 0.

    Where the columns are independent it is the matrix with orthonormal columns nearest to them
    (orthogonal Procrustes problem).
    """
    q, r = np.linalg.qr(matrix)
    u, values, vt = np.linalg.svd(r, full_matrices=False)
    keep = numerical_rank(values)
    factor: Matrix = q @ (u[:, :keep] @ vt[:keep])
    return factor


def numerical_rank(values: Matrix) -> int:
    """Return how many of the falling singular values float32 can tell from zero; at least 1."""
    return max(1, int(np.count_nonzero(values > values[0] * _NEGLIGIBLE)))


def energy_rank(values: Matrix, energy: Decimal) -> int:
    """Return the lowest rank whose singular values have the share `energy` of all their squares.

    It is at least 1, and never above the rank that float32 can tell from a lower one.
    """
    most = numerical_rank(values)
    squares = np.cumsum(values[:most] ** 2)
    return min(most, 1 + int(np.searchsorted(squares, float(energy) * squares[-1])))


def fit(matrix: FloatArray, rank: int) -> Pair:
    """Return factors of rank `rank`, in float32, that are nearly the best fit of a dense matrix.

    Block Krylov iteration (Musco and Musco, 2015, algorithm 2) from a fixed seed, then an SVD
    within the resulting subspace, which for a small matrix is the whole space. The error is less
    than one part in a thousand above that of the best fit (tested).
    """
    if matrix.shape[0] > matrix.shape[1]:
        b, a = fit(matrix.T, rank)
        return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    basis = _krylov(matrix, rank + _SPARE)
    q, r = np.linalg.qr((matrix.T @ basis.astype(np.float32)).astype(np.float64))
    u, values, vt = np.linalg.svd(r.T)
    root = np.sqrt(values[:rank])
    return _pair(root[:, None] * (vt[:rank] @ q.T), (basis @ u[:, :rank]) * root)


def _krylov(matrix: FloatArray, width: int) -> Matrix:
    """Return an orthonormal basis of the span of M·Ω, MMᵀ·M·Ω, … (d_out × width · steps)."""
    rows, columns = matrix.shape
    if width * _STEPS >= rows:
        return np.eye(rows)
    start = np.random.default_rng(0).standard_normal((columns, width), np.float32)
    blocks = [np.linalg.qr(matrix @ start)[0]]
    while len(blocks) < _STEPS:
        blocks.append(np.linalg.qr(matrix @ (matrix.T @ blocks[-1]))[0])
    return np.linalg.qr(np.concatenate(blocks, axis=1).astype(np.float64))[0]


def _pair(a: Matrix, b: Matrix) -> Pair:
    """Return A and B in float32 and C order."""
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
