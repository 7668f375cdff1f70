"""Second-order statistics of a layer's data: everything that selection needs, in p x p instead of d x p."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from solvers.reconstruction import LayerProblem, sum_over_chunks


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class GramStatistics:
    """Centred moments of the rows x and of a linear target T, each divided by the number of rows.

    With the best bias, target_mean - m x_mean, a matrix m has the mean squared error
    `target_energy - 2 tr(m cross') + tr(m gram m')` per row, summed over the outputs.

    Attributes:
        gram: mean of (x - x_mean)(x - x_mean)', (p, p).
        cross: mean of (T - target_mean)(x - x_mean)', (n, p).
        x_mean: (p,).
        target_mean: (n,).
        target_energy: mean of ||T - target_mean||^2.
    """

    gram: Float[Array, "p p"]
    cross: Float[Array, "n p"]
    x_mean: Float[Array, " p"]
    target_mean: Float[Array, " n"]
    target_energy: Float[Array, ""]


@jax.jit
def gram_statistics(problem: LayerProblem) -> GramStatistics:
    """Moments of the problem's rows and of its linear target, scaled by sqrt(weights) per output if there are any.

    Two passes in chunks: means first, so that the second moments are of centred values and float32 suffices.
    Temporaries: CHUNK_ROWS * (n + p) values.
    """
    d = problem.x.shape[0]
    target = problem.y if problem.response is None else problem.response
    rows = (problem.x, target, problem.offset)
    scale = None if problem.weights is None else jnp.sqrt(problem.weights)

    def aim(t: Array, offset: Array | None) -> Array:
        linear = t if offset is None else t - offset
        return linear if scale is None else linear * scale[None, :]

    sums = sum_over_chunks(lambda x, t, s: (jnp.sum(x, axis=0), jnp.sum(aim(t, s), axis=0)), rows, mesh=problem.mesh)
    x_mean, target_mean = sums[0] / d, sums[1] / d

    def moments(x: Array, t: Array, s: Array | None) -> tuple[Array, Array, Array]:
        x, t = x - x_mean[None, :], aim(t, s) - target_mean[None, :]
        return x.T @ x, t.T @ x, jnp.sum(t * t)

    gram, cross, energy = sum_over_chunks(moments, rows, mesh=problem.mesh)
    return GramStatistics(
        gram=gram / d, cross=cross / d, x_mean=x_mean, target_mean=target_mean, target_energy=energy / d
    )


def weight_statistics(w: Float[Array, "n p"], bias: Float[Array, " n"]) -> GramStatistics:
    """The statistics under which the mean squared error of m is ||w - m||^2: uncorrelated inputs of unit energy."""
    p, dtype = w.shape[1], w.dtype
    return GramStatistics(
        gram=jnp.eye(p, dtype=dtype),
        cross=w,
        x_mean=jnp.zeros(p, dtype),
        target_mean=jnp.asarray(bias, dtype),
        target_energy=jnp.sum(w * w),
    )


@jax.jit
def with_ridge(
    stats: GramStatistics, ridge: Float[ArrayLike, ""], towards: Float[Array, "n p"] | None = None
) -> GramStatistics:
    """The statistics with ridge * tr(gram) / p * ||m - towards||^2 added to the mean squared error of every m.

    `towards` is zero by default; the constant of the penalty is not part of `target_energy`. A zero gram becomes the
    identity.
    """
    p = stats.gram.shape[0]
    level = jnp.trace(stats.gram) / p
    shift = jnp.where(level > 0, ridge * level, jnp.ones_like(level)).astype(stats.gram.dtype)
    gram = stats.gram + shift * jnp.eye(p, dtype=stats.gram.dtype)
    cross = stats.cross if towards is None else stats.cross + shift * towards.astype(stats.cross.dtype)
    return replace(stats, gram=gram, cross=cross)


@jax.jit
def least_squares(stats: GramStatistics) -> Float[Array, "n p"]:
    """argmin over m of the mean squared error: cross gram^-1. Equals the layer's own matrix on its own inputs."""
    factor = jax.scipy.linalg.cho_factor(stats.gram, lower=True)
    return jax.scipy.linalg.cho_solve(factor, stats.cross.T).T


@jax.jit
def linear_error(stats: GramStatistics, m: Float[Array, "n p"]) -> Float[Array, ""]:
    """Relative squared error of x m' against the linear target with the best bias; 0 is perfect, 1 is m = 0."""
    quadratic = jnp.sum((m @ stats.gram) * m) - 2 * jnp.sum(m * stats.cross)
    safe = jnp.where(stats.target_energy > 0, stats.target_energy, jnp.ones_like(stats.target_energy))
    return (stats.target_energy + quadratic) / safe


@jax.jit
def best_bias(stats: GramStatistics, m: Float[Array, "n p"]) -> Float[Array, " n"]:
    """The bias that minimises the mean squared error for the given m."""
    return stats.target_mean - m @ stats.x_mean
