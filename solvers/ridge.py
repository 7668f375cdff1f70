"""The ridge of a layer's normal equations: as small as allowed with many rows, chosen on held-out rows with few.

The ridge draws towards the layer's original matrix where that is known: what the rows do not determine stays as it was.
"""

from itertools import accumulate, repeat
from operator import mul
from typing import NamedTuple

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
    wide = p <= float64_up_to
    dtype = jnp.float64 if wide else jnp.float32
    raw, held = gathered((gram_statistics(problem), gram_statistics(held_out)))
    with jax.enable_x64(wide):
        if original is not None and problem.weights is not None:
            original = original * jnp.sqrt(problem.weights)[:, None]
        own, other = (jax.tree.map(lambda a: jnp.asarray(a, dtype), s) for s in (raw, held))
        return SelectionStatistics(raw, held, *regularize(own, other, rows, ridge, original), wide)
