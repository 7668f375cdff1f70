"""The ridge of a layer's normal equations: as small as allowed with many rows, chosen on held-out rows with few.

The ridge draws towards the layer's original matrix where that is known: what the rows do not determine stays as it was.
"""

from itertools import accumulate, repeat
from operator import mul
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from solvers.gram import GramStatistics, gram_statistics, least_squares, linear_error, with_ridge
from solvers.reconstruction import LayerProblem
from solvers.sharding import gathered
from solvers.structure import column_structure, fit

SCARCE = 10  # rows per feature below which least squares overfits and a larger ridge is tried
_LARGEST = 10.0
_FACTOR = 10.0


@jax.jit
def _held_out_error(stats: GramStatistics, w: Array, held_out: GramStatistics) -> Float[Array, ""]:
    """Linear error on other rows of the half of the columns with most energy, refitted: a stand-in for every form."""
    p = w.shape[1]
    energy = jnp.sum(w * w, axis=0) * jnp.diagonal(stats.gram)
    kept = jnp.zeros(p, bool).at[jnp.argsort(-energy)[: max(1, p // 2)]].set(True)
    m = fit(column_structure(stats.gram, kept, jnp.zeros(p, bool), 0), stats.cross)
    return linear_error(held_out, m.astype(held_out.gram.dtype))


class _Rows(NamedTuple):
    """Centred rows and linear targets, outputs scaled by sqrt(weights)."""

    x: Float[Array, "d p"]
    target: Float[Array, "d n"]


def _rows(problem: LayerProblem, stats: GramStatistics, dtype: Any) -> _Rows:
    target = problem.y if problem.response is None else problem.response
    if problem.offset is not None:
        target = target - problem.offset
    if problem.weights is not None:
        target = target * jnp.sqrt(problem.weights)[None, :]
    x = jnp.asarray(problem.x, dtype) - stats.x_mean.astype(dtype)[None, :]
    return _Rows(x, jnp.asarray(target, dtype) - stats.target_mean.astype(dtype)[None, :])


@jax.jit
def _held_out_errors_by_rows(
    rows: _Rows, other: _Rows, shifts: Float[Array, " ridges"], original: Float[Array, "n p"]
) -> Float[Array, " ridges"]:
    """`_held_out_error` for every ridge (absolute) from d x d matrices alone.

    With w0 the matrix drawn to and K = x x', the minimiser of mean ||T - m x||^2 + shift ||m - w0||^2 is
    w0 + (T - x w0')' (K + d shift I)^-1 x; likewise on the kept columns.
    """
    d, p = rows.x.shape

    def pull(x: Array, shift: Array) -> Array:
        kernel = x @ x.T + d * shift * jnp.eye(d, dtype=x.dtype)
        return jnp.linalg.solve(kernel, rows.target - x @ original.T)

    def error(shift: Array) -> Array:
        w = original + pull(rows.x, shift).T @ rows.x
        energy = jnp.sum(w * w, axis=0) * (jnp.mean(rows.x * rows.x, axis=0) + shift)
        kept = jnp.zeros(p, bool).at[jnp.argsort(-energy)[: max(1, p // 2)]].set(True)
        x, held = (jnp.where(kept[None, :], values, 0) for values in (rows.x, other.x))
        gap = other.target - held @ original.T - (held @ x.T) @ pull(x, shift)
        total = jnp.sum(other.target * other.target)
        return jnp.sum(gap * gap) / jnp.where(total > 0, total, jnp.ones_like(total))

    return jax.lax.map(error, shifts)


def _ridge_by_rows(
    raw: GramStatistics, rows: _Rows, other: _Rows, ridge: float, original: Float[Array, "n p"] | None
) -> float:
    """The ridge in {ridge, 10 ridge, ..., 10} of least held-out error, for far fewer rows than features."""
    trials = [ridge]
    while trials[-1] * _FACTOR <= _LARGEST:
        trials.append(trials[-1] * _FACTOR)
    level = jnp.trace(raw.gram) / raw.gram.shape[0]
    shifts = jnp.where(level > 0, level, jnp.ones_like(level)) * jnp.asarray(trials, raw.gram.dtype)
    towards = jnp.zeros_like(raw.cross) if original is None else original.astype(raw.cross.dtype)
    errors = np.asarray(_held_out_errors_by_rows(rows, other, shifts, towards))
    return trials[int(np.nanargmin(errors))] if np.isfinite(errors).any() else trials[-1]


def regularize(
    raw: GramStatistics,
    held_out: GramStatistics,
    rows: int,
    ridge: float,
    original: Float[Array, "n p"] | None = None,
) -> tuple[GramStatistics, Float[Array, "n p"], float]:
    """Statistics with the ridge that serves held-out rows best, their least-squares matrix, and that ridge.

    With `SCARCE` rows per feature or more the first ridge is taken that leaves the Gram matrix positive definite in
    floating point; with fewer, the one in {ridge, 10 ridge, ..., 10} of least held-out error.

    Args:
        raw: statistics of the calibration rows.
        held_out: of other rows.
        rows: how many calibration rows there are.
        ridge: the smallest to try, relative to the Gram matrix's mean diagonal.
        original: what the ridge draws towards; None: zero.
    """
    scarce = rows < SCARCE * raw.gram.shape[0]
    best = None
    for trial in accumulate(repeat(_FACTOR), mul, initial=ridge):
        stats = with_ridge(raw, trial, original)
        w = least_squares(stats)
        definite = bool(np.isfinite(w).all())
        error = float(_held_out_error(stats, w, held_out)) if definite and scarce else float("inf")
        if best is None or error < best[0] or not scarce:
            best = (error, stats, w, trial)
        if (definite and not scarce) or trial * _FACTOR > _LARGEST:
            break
    assert best is not None
    return best[1:]


class SelectionStatistics(NamedTuple):
    """What forms are selected on.

    Attributes:
        raw: statistics of the calibration rows, float32.
        held_out: of the held-out rows, float32.
        stats: of the calibration rows with ridge, in the precision of the selection.
        w: least-squares matrix of `stats`, (n, p).
        ridge: that was used.
        wide: whether `stats` and `w` are in float64.
    """

    raw: GramStatistics
    held_out: GramStatistics
    stats: GramStatistics
    w: Array
    ridge: float
    wide: bool


def selection_statistics(
    problem: LayerProblem,
    held_out: LayerProblem,
    *,
    ridge: float,
    float64_up_to: int,
    original: Float[Array, "n p"] | None = None,
) -> SelectionStatistics:
    """Statistics of a layer's rows, regularised; outputs are scaled by sqrt(weights).

    Args:
        problem: calibration rows.
        held_out: other rows.
        ridge: the smallest, see `regularize`.
        float64_up_to: largest p for which float64 is used.
        original: the layer's own matrix, which the ridge draws towards.
    """
    rows, p = problem.x.shape
    few = 2 * rows <= p
    wide = p <= float64_up_to
    dtype = jnp.float64 if wide else jnp.float32
    raw, held = gathered((gram_statistics(problem), gram_statistics(held_out)))
    with jax.enable_x64(wide):
        if original is not None and problem.weights is not None:
            original = original * jnp.sqrt(problem.weights)[:, None]
        own, other = (jax.tree.map(lambda a: jnp.asarray(a, dtype), s) for s in (raw, held))
        if few:  # each trial of `regularize` costs p^3
            ridge = _ridge_by_rows(own, _rows(problem, own, dtype), _rows(held_out, other, dtype), ridge, original)
            rows = SCARCE * p
        return SelectionStatistics(raw, held, *regularize(own, other, rows, ridge, original), wide)
