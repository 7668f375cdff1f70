"""Gradients of single examples with respect to a layer's matrix, summed in squares without keeping them.

An example sees the layer at s positions: one for a dense layer, the output pixels of a convolution. With rows x_t (its
inputs there) and derivatives d_t at its outputs, its gradient is sum_t x_t d_t', a (p, n) matrix.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

PAIRS_UP_TO = 8
"""Positions up to which products of pairs of positions cost less than forming every example's gradient."""


def sum_of_squares_by_pairs(rows: Float[Array, "b s p"], delta: Float[Array, "b s n"]) -> Float[Array, "p n"]:
    """sum_b (sum_t x_bt d_bt')^2 = sum_{t, u} (x_t * x_u)' (d_t * d_u): one matrix product; for s = 1 (x^2)' (d^2).

    Memory: s (s + 1) / 2 times (rows + delta) / s.
    """
    t, u = np.triu_indices(rows.shape[1])
    twice = np.where(t == u, 1.0, 2.0)
    x = rows[:, t] * rows[:, u]
    d = delta[:, t] * delta[:, u] * jnp.asarray(twice, delta.dtype)[None, :, None]
    return x.reshape(-1, rows.shape[2]).T @ d.reshape(-1, delta.shape[2])


def sum_of_squares_one_by_one(
    inputs: Float[Array, "b ..."], delta: Float[Array, "b s n"], rows_of: Callable[[Array], Array]
) -> Float[Array, "p n"]:
    """The same, one example after the other, with the rows of an example made when it is its turn.

    Memory: the rows of one example and two (p, n) matrices.

    Args:
        inputs: what the layer sees.
        delta: derivatives at its outputs.
        rows_of: the (s, p) rows of one example's inputs.
    """

    def add(total: Array, example: tuple[Array, Array]) -> tuple[Array, None]:
        x, d = example
        gradient = rows_of(x).T @ d
        return total + gradient * gradient, None

    p = jax.eval_shape(rows_of, inputs[0]).shape[1]
    return lax.scan(add, jnp.zeros((p, delta.shape[2]), delta.dtype), (inputs, delta))[0]
