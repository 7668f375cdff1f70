"""The layer problem: reproduce a layer's response after its activation, from sampled rows.

    L(m) = 1/2 || W^(1/2) (y - r(x m' + bias + offset)) ||_F^2 / || W^(1/2) y ||_F^2

with r the activation and W = diag(weights) over the outputs (ones when absent).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from solvers.activation import RELU, Activation

CHUNK_ROWS = 4096  # temporaries of a pass over the data hold CHUNK_ROWS * n values


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """Sampled rows of one layer. d rows, p input features, n outputs.

    Attributes:
        x: im2col rows, (d, p), features ordered as a Flax HWIO kernel flattens.
        y: the target after the activation, (d, n).
        bias: the layer's bias, (n,).
        response: the target before the activation, (d, n), where known; linear fits aim at it.
        offset: what the network adds before the activation (a shortcut branch), (d, n).
        weights: non-negative weight of each output in the loss, (n,).
        activation: r(.), static under jit.
    """

    x: Float[Array, "d p"]
    y: Float[Array, "d n"]
    bias: Float[Array, " n"]
    response: Float[Array, "d n"] | None = None
    offset: Float[Array, "d n"] | None = None
    weights: Float[Array, " n"] | None = None
    activation: Activation = field(default=RELU, metadata={"static": True})


T = TypeVar("T")


def sum_over_chunks(body: Callable[..., T], rows: tuple[Array | None, ...], chunk: int = CHUNK_ROWS) -> T:
    """sum over chunks c of body(*rows[c]), so that temporaries never exceed `chunk` rows.

    `rows` share their first axis d (None entries are passed through). Whole chunks go through one `lax.scan`,
    the remainder through one more call of `body`, so no padding enters the sum.
    """
    d = next(r.shape[0] for r in rows if r is not None)
    whole = d // chunk

    def cut(start: Array | int, size: int) -> tuple[Array | None, ...]:
        return tuple(None if r is None else lax.dynamic_slice_in_dim(r, start, size) for r in rows)

    def step(total: T, i: Array) -> tuple[T, None]:
        return jax.tree.map(jnp.add, total, body(*cut(i * chunk, chunk))), None

    tail = body(*cut(whole * chunk, d - whole * chunk)) if d > whole * chunk else None
    if not whole:
        assert tail is not None
        return tail
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda: body(*cut(0, chunk))))
    total, _ = lax.scan(step, zero, jnp.arange(whole))
    return total if tail is None else jax.tree.map(jnp.add, total, tail)


def preactivation(
    x: Float[Array, "rows p"],
    m: Float[Array, "n p"],
    bias: Float[Array, " n"],
    offset: Float[Array, "rows n"] | None,
) -> Float[Array, "rows n"]:
    """z = x m' + bias + offset."""
    z = x @ m.T + bias[None, :]
    return z if offset is None else z + offset


def target_energy(problem: LayerProblem) -> Float[Array, ""]:
    """|| W^(1/2) y ||_F^2, or 1 when y is zero, so that dividing by it is always safe."""
    per_output = sum_over_chunks(lambda y: jnp.sum(y * y, axis=0), (problem.y,))
    energy = jnp.sum(per_output if problem.weights is None else per_output * problem.weights)
    return jnp.where(energy > 0, energy, jnp.ones_like(energy))


def residual_energy(
    problem: LayerProblem, m: Float[Array, "n p"], bias: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """|| W^(1/2) (y - r(x m' + bias + offset)) ||_F^2; `bias` defaults to the problem's."""
    b = problem.bias if bias is None else bias

    def body(x: Array, y: Array, offset: Array | None) -> Array:
        gap = y - problem.activation(preactivation(x, m, b, offset))
        return jnp.sum(gap * gap, axis=0)

    per_output = sum_over_chunks(body, (problem.x, problem.y, problem.offset))
    return jnp.sum(per_output if problem.weights is None else per_output * problem.weights)


def relative_error(
    problem: LayerProblem, m: Float[Array, "n p"], bias: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """|| y - r(x m' + bias + offset) ||^2 / || y ||^2, both weighted: squared relative error after the activation."""
    return residual_energy(problem, m, bias) / target_energy(problem)


def loss(problem: LayerProblem, m: Float[Array, "n p"]) -> Float[Array, ""]:
    """L(m), the first line of this file."""
    return jnp.asarray(0.5, problem.x.dtype) * relative_error(problem, m)
