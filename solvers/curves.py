"""Error against size for columns and low rank, every size at once, from one pass over a layer's Gram matrix.

Allocating a budget over layers needs the whole curve of each; the better forms lie below these by a factor that varies
little from layer to layer.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from solvers.columns import error_curve, group_order, obs_order
from solvers.gram import GramStatistics
from solvers.structure import column_structure, fit
from solvers.terms import MatrixShape


@dataclass(frozen=True, kw_only=True)
class ErrorCurves:
    """Relative squared error before the activation of the best fit on calibration rows, for every size.

    Attributes:
        order: the columns, most useful first, (p,).
        columns: error with the first k columns of `order`, k = 0 ... p.
        low_rank: error with rank r on all columns, r = 0 ... min(n, p).
        group_size: columns that are kept or dropped together; sizes between multiples of it are not offered.
    """

    order: Int[np.ndarray, " p"]
    columns: Float[np.ndarray, " sizes"]
    low_rank: Float[np.ndarray, " ranks"]
    group_size: int = 1


@jax.jit
def _rank_errors(stats: GramStatistics, w: Array) -> Float[Array, " ranks"]:
    """sum of the squared singular values of w gram^(1/2) beyond each rank, relative."""
    n, p = w.shape
    energy = w @ stats.gram @ w.T
    if n > p:
        chol = jnp.linalg.cholesky(stats.gram)
        energy = (w @ chol).T @ (w @ chol)
    values = jnp.clip(jnp.linalg.eigvalsh(energy), 0)[::-1]
    total = jnp.sum(values)
    left = jnp.concatenate([total[None], total - jnp.cumsum(values)])
    return jnp.clip(left / jnp.where(total > 0, total, 1), 0)


def error_curves(
    stats: GramStatistics, w: Float[Array, "n p"], shape: MatrixShape, group: str = "column"
) -> ErrorCurves:
    """Both curves of one layer.

    Args:
        stats: with ridge, so that the Gram matrix is positive definite.
        w: its least-squares matrix, (n, p).
        shape: of the layer.
        group: "column", or "channel" to keep and drop whole input channels.
    """
    p = shape.p
    size = 1 if group == "column" else p // shape.c_in
    if size == 1:
        order = obs_order(stats.gram, w)
    else:
        order = group_order(stats.gram, w, np.arange(p) % shape.c_in)
    errors = np.asarray(error_curve(stats.gram, w, order), np.float64)
    return ErrorCurves(
        order=np.asarray(order),
        columns=np.clip(errors / max(float(errors[0]), np.finfo(float).tiny), 0, None),
        low_rank=np.asarray(_rank_errors(stats, w), np.float64),
        group_size=size,
    )


def fit_columns(stats: GramStatistics, order: Int[np.ndarray, " p"], k: int) -> Float[Array, "n p"]:
    """Least squares on the first k columns of an order."""
    free: Bool[np.ndarray, " p"] = np.zeros(len(order), bool)
    free[order[:k]] = True  # in NumPy: every k would be compiled anew
    return _fit(stats, jnp.asarray(free), jnp.asarray(np.zeros_like(free)), 0)


def fit_rank(stats: GramStatistics, r: int) -> Float[Array, "n p"]:
    """Reduced-rank regression on all columns."""
    every = np.ones(stats.gram.shape[0], bool)
    return _fit(stats, jnp.asarray(~every), jnp.asarray(every), r)


@jax.jit
def _fit(stats: GramStatistics, free: Array, tail: Array, rank: int | Array) -> Array:
    return fit(column_structure(stats.gram, free, tail, rank), stats.cross)
