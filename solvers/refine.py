"""Refinement after the activation, with the structure of the layer fixed.

Each step fits the structure to a target T for the response z, in closed form:

    pull   T = y where y > 0, min(z, 0) elsewhere        (ReLU only: a convex upper bound of the loss, fast at first)
    tight  T = z + r'(z) (y - r(z))                       (for ReLU an exact majoriser of the loss, hence monotone)

A few pull steps, then tight ones, with T over-relaxed around z and, where data is scarce, blended with the original
linear response. The iterate with the lowest error on held-out rows is kept. Related: Zhang et al. (2015), "Accelerating
Very Deep Convolutional Networks", nonlinear asymmetric reconstruction.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from solvers.activation import IDENTITY, RELU
from solvers.gram import GramStatistics
from solvers.reconstruction import LayerProblem, preactivation, relative_error, sum_over_chunks
from solvers.structure import Structure, fit


@dataclass(frozen=True, kw_only=True)
class RefineOptions:
    """Static options.

    Attributes:
        steps: passes over the data.
        pull_steps: how many of the first ones aim at the pull target (ReLU only).
        over_relaxation: T <- z + over_relaxation (T - z); above 1 it halves the steps needed.
    """

    steps: int = 10
    pull_steps: int = 5
    over_relaxation: float = 1.5


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Refined:
    """The best iterate on held-out rows.

    Attributes:
        matrix: (n, p).
        bias: (n,).
        held_out_errors: relative error after the activation on held-out rows: the start's, then each step's.
        best_step: which of these the returned iterate is; 0 means that refinement did not help.
    """

    matrix: Float[Array, "n p"]
    bias: Float[Array, " n"]
    held_out_errors: Float[Array, " steps_plus_1"]
    best_step: Int[Array, ""]


def blend_for(rows: int, active: float, kept_columns: int) -> float:
    """The blend that measured best: 1 with at least 30 active rows per kept column, else 0.8.

    Args:
        rows: d.
        active: fraction of outputs with y > 0.
        kept_columns: number of columns that the form keeps.
    """
    return 1.0 if rows * active >= 30 * kept_columns else 0.8


def _correction(
    problem: LayerProblem, m: Array, bias: Array, pull: Array, blend: Array, over_relaxation: float
) -> tuple[Array, Array]:
    """mean of (T - z) x' and mean of T - z, in one pass of two products."""
    activation = problem.activation

    def body(x: Array, y: Array, response: Array | None, offset: Array | None) -> tuple[Array, Array]:
        z = preactivation(x, m, bias, offset)
        value, pullback = jax.vjp(activation, z)
        step = pullback(y - value)[0]
        if activation == RELU:
            step = jnp.where(pull, jnp.where(y > 0, y, jnp.minimum(z, 0)) - z, step)
        step = over_relaxation * step
        if response is not None:
            step = blend * step + (1 - blend) * (response - z)
        return step.T @ x, jnp.sum(step, axis=0)

    rows = (problem.x, problem.y, problem.response, problem.offset)
    cross, total = sum_over_chunks(body, rows, mesh=problem.mesh)
    d = problem.x.shape[0]
    return cross / d, total / d


@partial(jax.jit, static_argnames="options")
def refine(
    problem: LayerProblem,
    held_out: LayerProblem,
    stats: GramStatistics,
    structure: Structure,
    matrix: Float[Array, "n p"],
    bias: Float[Array, " n"],
    blend: Float[Array, ""] | float,
    options: RefineOptions = RefineOptions(),
) -> Refined:
    """Lower ||y - r(x m' + bias + offset)||^2 over the matrices of one structure and the bias.

    Args:
        problem: the rows fitted.
        held_out: other rows, on which the best iterate is judged.
        stats: statistics of `problem`'s rows (with the ridge that `structure` was made with).
        structure: what the form keeps.
        matrix: start, a member of the structure.
        bias: start, (n,).
        blend: weight of the activation-aware target against the linear response, in (0, 1]; see `blend_for`.
        options: static.
    """
    blend = jnp.asarray(blend, matrix.dtype)
    relax = 1.0 if problem.activation == IDENTITY else options.over_relaxation
    first = relative_error(held_out, matrix, bias)

    def step(carry: tuple, i: Array) -> tuple[tuple, Array]:
        m, b, best = carry
        cross_step, mean_step = _correction(problem, m, b, i < options.pull_steps, blend, relax)
        cross = m @ stats.gram + cross_step - mean_step[:, None] * stats.x_mean[None, :]
        new_m = fit(structure, cross, problem.weights)
        new_b = b + mean_step + (m - new_m) @ stats.x_mean
        error = relative_error(held_out, new_m, new_b)
        candidate = (error, new_m, new_b, i + 1)
        best = jax.tree.map(lambda new, old: jnp.where(error < best[0], new, old), candidate, best)
        return (new_m, new_b, best), error

    start = (matrix, bias, (first, matrix, bias, jnp.asarray(0, jnp.int32)))
    (_, _, best), errors = lax.scan(step, start, jnp.arange(options.steps, dtype=jnp.int32))
    history = jnp.concatenate([first[None], errors])
    return Refined(matrix=best[1], bias=best[2], held_out_errors=history, best_step=best[3])
