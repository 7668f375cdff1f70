"""From a fitted matrix and what its form keeps to the exact-size arrays that are stored.

Runs on the host in float64. In the gauge form a factor is multiplied by the inverse of r of its rows (or columns), so
that those become the identity and need not be stored; QR with column pivoting picks a well-conditioned set. Where no
set is well-conditioned the plain form is returned: a little larger, never inaccurate.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy.linalg import qr

from solvers.terms import Columns, Dense, LowRank, Spatial, Term

_WORST_CONDITION = 1e4  # float32 factors then still reproduce the matrix to 1e-3 of its rounding-free value


def extract_dense(m: Float[np.ndarray, "n p"]) -> tuple[Term, ...]:
    """The matrix as it is."""
    return (Dense(np.asarray(m, np.float32)),)


def pivot_rows(u: Float[np.ndarray, "n r"]) -> np.ndarray | None:
    """r rows of u that form a well-conditioned square block, None if there are none."""
    rank = u.shape[1]
    pivots = np.asarray(qr(u.T, mode="r", pivoting=True)[1][:rank], np.int32)
    return pivots if np.linalg.cond(u[pivots]) < _WORST_CONDITION else None


def _columns(m: np.ndarray, free: np.ndarray) -> list[Term]:
    indices = np.flatnonzero(free).astype(np.int32)
    return [Columns(np.asarray(m[:, indices], np.float32), indices)] if len(indices) else []


def _low_rank(m: np.ndarray, tail: np.ndarray, rank: int, gauge: bool) -> list[Term]:
    indices = np.flatnonzero(tail).astype(np.int32)
    rank = min(rank, m.shape[0], len(indices))
    if rank == 0:
        return []
    left, sigma, right = np.linalg.svd(m[:, indices], full_matrices=False)
    root = np.sqrt(sigma[:rank])
    u, v = left[:, :rank] * root, root[:, None] * right[:rank]
    pivots = pivot_rows(left[:, :rank]) if gauge else None
    if pivots is None:
        return [LowRank(u.astype(np.float32), v.astype(np.float32), indices)]
    block = left[pivots, :rank]
    others = np.setdiff1d(np.arange(len(u)), pivots)
    # u v = (u block^-1) (block v): the pivot rows of the new u are the identity, and v holds those rows of the product.
    rest = np.linalg.solve(block.T, left[others, :rank].T).T
    values = block @ (sigma[:rank, None] * right[:rank])
    return [LowRank(rest.astype(np.float32), values.astype(np.float32), indices, pivots)]


def extract_two_level(
    m: Float[np.ndarray, "n p"], free: Bool[np.ndarray, " p"], tail: Bool[np.ndarray, " p"], rank: int, *, gauge: bool
) -> tuple[Term, ...]:
    """m with its columns `free` as they are and its columns `tail`, of rank `rank`, as u v.

    Args:
        m: the fitted matrix; zero elsewhere.
        free: S1.
        tail: S2 minus S1.
        rank: of the columns `tail`.
        gauge: store u with an identity block.

    Returns:
        The terms that hold anything.
    """
    exact = np.asarray(m, np.float64)
    return (*_columns(exact, free), *_low_rank(exact, tail & ~free, rank, gauge))


def extract_spatial(
    m: Float[np.ndarray, "n p"],
    first: Float[np.ndarray, "r_max q"],
    rank: int,
    columns: Bool[np.ndarray, " p"],
    window: tuple[int, ...],
    c_in: int,
    *,
    gauge: bool,
) -> tuple[Term, ...]:
    """m as a spatial pair with the given first factor, plus single columns, by least squares on those features.

    Args:
        m: the fitted matrix, a combination of the features.
        first: (r_max, kw * c_in); the first `rank` rows count.
        rank: r.
        columns: the single columns.
        window: (kh, kw).
        c_in: input channels.
        gauge: store the first factor with an identity block.

    Returns:
        The terms that hold anything.
    """
    exact, b = np.asarray(m, np.float64), np.asarray(first, np.float64)[:rank]
    n, rows, q = exact.shape[0], window[0], window[1] * c_in
    kept = np.flatnonzero(columns).astype(np.int32)
    features = np.concatenate([np.kron(np.eye(rows), b), np.eye(rows * q)[kept]])
    coefficients = np.linalg.lstsq(features.T, exact.T, rcond=None)[0].T
    second = coefficients[:, : rows * rank].reshape(n, rows, rank)
    terms: list[Term] = []
    if len(kept):
        terms.append(Columns(coefficients[:, rows * rank :].astype(np.float32), kept))
    if rank == 0:
        return tuple(terms)
    pivots = pivot_rows(np.linalg.qr(b.T)[0]) if gauge else None
    if pivots is None:
        terms.append(Spatial(b.astype(np.float32), second.astype(np.float32)))
        return tuple(terms)
    block = b[:, pivots]
    others = np.setdiff1d(np.arange(q), pivots)
    rest = np.linalg.solve(block, b[:, others])
    terms.append(Spatial(rest.astype(np.float32), (second @ block).astype(np.float32), pivots))
    return tuple(terms)
