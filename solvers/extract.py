"""From a fitted matrix and what it keeps to exact-size NumPy terms, in float64 on the host.

Gauge form: a product of two factors of rank r does not change when an invertible r x r matrix is moved from one to the
other, so r rows (columns) of one factor can be made the identity and need not be stored. The pivots come from a QR
factorisation with column pivoting, which keeps the other entries near or below 1. When the pivot block is so
ill-conditioned that float32 would lose digits, the plain form is returned: the term's `pivots` are then empty and it
stores r^2 values more.
"""

from math import prod
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float, Float64, Int

from solvers.terms import Columns, Dense, LowRank, MatrixShape, Spatial, Term

GAUGE_TOLERANCE = 3e-6  # relative float32 error above which the gauge form is given up
STRUCTURE_TOLERANCE = 1e-3  # relative distance from the structure above which the input must be wrong
_SKETCH_FROM = 1024  # smaller side from which a full SVD takes long
RANK_TOLERANCE = 1e-7  # singular values below this fraction of the largest are float32 noise


def extract_dense(m: Float[np.ndarray | Array, "n p"]) -> tuple[Term, ...]:
    """All of m as one term.

    Raises:
        ValueError: m is not finite.
    """
    return (Dense(checked(m).astype(np.float32)),)


def extract_two_level(
    m: Float[np.ndarray | Array, "n p"],
    free: Bool[np.ndarray | Array, " flags"],
    tail: Bool[np.ndarray | Array, " flags"],
    rank: int,
    *,
    gauge: bool,
) -> tuple[Term, ...]:
    """Columns on `free` plus u v with v on `tail`; what is empty is left out.

    Args:
        m: (n, p), zero outside both masks, of rank at most `rank` on `tail`.
        free: columns stored as they are.
        tail: columns that only v reads (overlap with `free` is ignored).
        rank: inner dimension of u v; fewer if m has less.
        gauge: whether r rows of u are the identity and not stored.

    Returns:
        At most one `Columns` and one `LowRank`; the pivots of the latter are empty if the gauge was not possible.

    Raises:
        ValueError: m is not finite or not of this structure.
    """
    matrix, is_free = checked(m), np.asarray(free, bool)
    is_tail = np.asarray(tail, bool) & ~is_free
    if is_free.shape != matrix.shape[1:] or is_tail.shape != matrix.shape[1:]:
        raise ValueError(f"free {is_free.shape} and tail {is_tail.shape}: pass one flag per column of m {matrix.shape}")
    terms: list[Term] = []
    if is_free.any():
        terms.append(Columns(matrix[:, is_free].astype(np.float32), _indices(is_free)))
    factors = _factor(matrix[:, is_tail], int(rank))
    if factors is not None:
        terms.append(_low_rank(*factors, _indices(is_tail), gauge))
    require_structure(matrix, terms, MatrixShape((), matrix.shape[1], matrix.shape[0]))
    return tuple(terms)


def extract_spatial(
    m: Float[np.ndarray | Array, "n p"],
    first: Float[np.ndarray | Array, "r_max q"],
    rank: int,
    columns: Bool[np.ndarray | Array, " p"],
    window: tuple[int, ...],
    c_in: int,
    *,
    gauge: bool,
) -> tuple[Term, ...]:
    """A pair of spatial factors plus single columns; what is empty is left out.

    The second factor is least squares of m on the features outside the columns, one kernel row at a time; the columns
    hold what it leaves there.

    Args:
        m: (n, p), a combination of the features and the columns.
        first: the first factor, in its first `rank` rows.
        rank: r.
        columns: the single columns.
        window: (kh, kw).
        c_in: input channels.
        gauge: whether r columns of the first factor are the identity and not stored.

    Returns:
        At most one `Spatial` and one `Columns`; the pivots of the former are empty if the gauge was not possible.

    Raises:
        ValueError: shapes do not fit, m is not finite or not of this structure.
    """
    matrix, single = checked(m), np.asarray(columns, bool)
    n, p = matrix.shape
    basis = np.asarray(first, np.float64)[: int(rank)]
    if len(window) != 2 or prod(window) * c_in != p or basis.shape[1] * window[0] != p or single.shape != (p,):
        raise ValueError(
            f"m {matrix.shape}, first {np.shape(first)}, columns {single.shape} do not fit window={window}, c_in={c_in}"
        )
    shape = MatrixShape(tuple(window), c_in, n)
    second = _second_factor(matrix, basis, single, window[0])
    rest = matrix - np.einsum("ois,sq->oiq", second, basis).reshape(n, p)
    terms: list[Term] = []
    if len(basis):
        terms.append(_spatial(basis, second, shape, gauge))
    if single.any():
        terms.append(Columns(rest[:, single].astype(np.float32), _indices(single)))
    require_structure(matrix, terms, shape)
    return tuple(terms)


def checked(m: Float[np.ndarray | Array, "n p"]) -> Float64[np.ndarray, "n p"]:
    """The matrix in float64; a ValueError if it is not finite."""
    matrix = np.asarray(m, np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError("m holds NaN or Inf: the fit failed; keep the layer dense or raise the ridge")
    return matrix


def _indices(mask: Bool[np.ndarray, " p"]) -> Int[np.ndarray, " k"]:
    return np.flatnonzero(mask).astype(np.int32)


def _distance(approximation: Float[np.ndarray, "n p"], target: Float64[np.ndarray, "n p"]) -> float:
    """Relative Frobenius distance; absolute when the target is zero."""
    scale = np.linalg.norm(target)
    return float(np.linalg.norm(approximation - target) / (scale if scale > 0 else 1.0))


def require_structure(matrix: Float64[np.ndarray, "n p"], terms: list[Term], shape: MatrixShape) -> None:
    """Raise a ValueError unless the terms add up to the matrix."""
    total = sum((t.matrix(shape).astype(np.float64) for t in terms), np.zeros_like(matrix))
    distance = _distance(total, matrix)
    if distance > STRUCTURE_TOLERANCE:
        raise ValueError(
            f"m is {distance:.1e} (relative) away from what is kept; refit it with the same masks and rank"
        )


def leading_svd(
    tail: Float64[np.ndarray, "n k"], rank: int
) -> tuple[Float64[np.ndarray, "n q"], Float64[np.ndarray, " q"], Float64[np.ndarray, "q k"]]:
    """At least the `rank` leading singular triples of a matrix that has hardly more.

    Large matrices go through a random range of a few more dimensions with one power iteration (Halko, Martinsson and
    Tropp 2011, algorithm 5.1), which is exact for a matrix of that rank.
    """
    wanted = rank + 16
    if min(tail.shape) < _SKETCH_FROM or 2 * wanted > min(tail.shape):
        return np.linalg.svd(tail, full_matrices=False)
    random = np.random.default_rng(0).standard_normal((tail.shape[1], wanted))
    basis = np.linalg.qr(tail @ random)[0]
    basis = np.linalg.qr(tail @ (tail.T @ basis))[0]
    u, s, v = np.linalg.svd(basis.T @ tail, full_matrices=False)
    return basis @ u, s, v


def _factor(
    tail: Float64[np.ndarray, "n k"], rank: int
) -> tuple[Float64[np.ndarray, "n r"], Float64[np.ndarray, "r k"]] | None:
    """Balanced factors of the best rank-`rank` approximation, or None if nothing is left."""
    if rank < 0:
        raise ValueError(f"rank={rank}: must be 0 or more")
    if not rank or not tail.size or not tail.any():
        return None
    u, s, v = leading_svd(tail, rank)
    r = min(rank, int(np.sum(s > RANK_TOLERANCE * s[0])))
    root = np.sqrt(s[:r])
    return u[:, :r] * root[None, :], root[:, None] * v[:r]


def _pivots(wide: Float64[np.ndarray, "r cols"]) -> Int[np.ndarray, " r"] | None:
    """r well-conditioned columns of a wide matrix, most independent first; None if it has lower rank."""
    result: Any = scipy.linalg.qr(wide, mode="r", pivoting=True)
    diagonal, order = np.abs(np.diagonal(result[0])), result[1]
    if len(diagonal) < wide.shape[0] or diagonal.min() <= 1e-10 * diagonal.max():
        return None
    return order[: wide.shape[0]].astype(np.int32)


def _low_rank(
    u: Float64[np.ndarray, "n r"], v: Float64[np.ndarray, "r k"], indices: Int[np.ndarray, " k"], gauge: bool
) -> LowRank:
    n, target = u.shape[0], u @ v
    pivots = _pivots(u.T) if gauge else None
    if pivots is not None:
        block = u[pivots]
        others = np.setdiff1d(np.arange(n), pivots)
        rest = np.linalg.solve(block.T, u[others].T).T
        term = LowRank(rest.astype(np.float32), (block @ v).astype(np.float32), indices, pivots)
        if _distance(term.full_u(n) @ term.v, target) <= GAUGE_TOLERANCE:
            return term
    return LowRank(u.astype(np.float32), v.astype(np.float32), indices)


def with_gauge(term: LowRank) -> LowRank:
    """The same term with an identity block in u, where that is well conditioned: r^2 fewer values are stored.

    Args:
        term: without gauge.
    """
    u, v = np.asarray(term.u, np.float64), np.asarray(term.v, np.float64)
    return _low_rank(u, v, term.indices, gauge=True) if term.rank else term


def _second_factor(
    matrix: Float64[np.ndarray, "n p"], basis: Float64[np.ndarray, "r q"], single: Bool[np.ndarray, " p"], rows: int
) -> Float64[np.ndarray, "n rows r"]:
    n, (r, q) = matrix.shape[0], basis.shape
    second = np.zeros((n, rows, r))
    for i in range(rows if r else 0):
        outside = ~single[i * q : (i + 1) * q]
        if outside.any():
            second[:, i] = np.linalg.lstsq(basis[:, outside].T, matrix[:, i * q : (i + 1) * q][:, outside].T)[0].T
    return second


def _spatial(
    first: Float64[np.ndarray, "r q"], second: Float64[np.ndarray, "n rows r"], shape: MatrixShape, gauge: bool
) -> Spatial:
    """The pair of factors, in gauge form if that is asked for and well conditioned."""
    target = np.einsum("ois,sq->oiq", second, first).reshape(shape.n, shape.p)
    pivots = _pivots(first) if gauge else None
    if pivots is not None:
        block = first[:, pivots]
        others = np.setdiff1d(np.arange(first.shape[1]), pivots)
        rest = np.linalg.solve(block, first[:, others])
        term = Spatial(rest.astype(np.float32), (second @ block).astype(np.float32), pivots)
        if _distance(term.matrix(shape), target) <= GAUGE_TOLERANCE:
            return term
    return Spatial(first.astype(np.float32), second.astype(np.float32))
