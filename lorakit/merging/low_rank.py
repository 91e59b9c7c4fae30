"""Low-rank fits: two factors whose product is nearest to a matrix or to a product of factors.

Only matrices are known here. A product of factors is never formed: QR of both factors and an SVD of
the small core suffice. A dense matrix is fitted by a randomised block Krylov method.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorakit.adapters.tensors import FloatArray, Pair

Matrix = NDArray[np.float64]

_SPARE = 10  # directions beyond the rank that a Krylov block carries
_STEPS = 6
_NEGLIGIBLE = 2.0**-24  # half the spacing of float32: storing the factors changes ΔW by as much


def refit(a: FloatArray, b: FloatArray, rank: int | None = None) -> Pair:
    """Return the factors of the matrix of rank `rank` nearest to B·A, in float32.

    A is (R × d_in), B (d_out × R). Nearest in the Frobenius norm (Eckart and Young, 1936), by QR of
    B and of Aᵀ and an SVD of the core R_B·R_Aᵀ, in float64: time and memory grow with R, never with
    d_in·d_out. Without `rank`, it is the lowest whose error float32 cannot tell from zero. Each
    factor takes the root of every singular value, so that both are of similar size.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    u, values, vt = np.linalg.svd(r_b @ r_a.T)
    keep = numerical_rank(values) if rank is None else min(rank, len(values))
    root = np.sqrt(values[:keep])
    return _pair(root[:, None] * (vt[:keep] @ q_a.T), (q_b @ u[:, :keep]) * root)


def numerical_rank(values: Matrix) -> int:
    """Return how many of the falling singular values float32 can tell from zero; at least 1."""
    return max(1, int(np.count_nonzero(values > values[0] * _NEGLIGIBLE)))


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
