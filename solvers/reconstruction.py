"""The layer problem: reproduce a layer's response after its activation, from sampled rows.

    L(m) = 1/2 || W^(1/2) (y - r(x m' + bias + offset)) ||_F^2 / || W^(1/2) y ||_F^2

with r the activation and W = diag(weights) over the outputs (ones when absent).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from solvers.activation import IDENTITY, RELU, Activation

CHUNK_ROWS = 4096  # temporaries of a pass over the data hold CHUNK_ROWS * n values


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """Sampled rows of one layer. d rows, p input features, n outputs. A stack for vmap has leading axes.

    Attributes:
        x: im2col rows, (d, p), features ordered as a Flax HWIO kernel flattens.
        y: the target after the activation, (d, n).
        bias: the layer's bias, (n,).
        response: the target before the activation, (d, n), where known; linear fits aim at it.
        offset: what the network adds before the activation (a shortcut branch), (d, n).
        weights: non-negative weight of each output in the loss, (n,).
        activation: r(.), static under jit.
        mesh: the devices that the rows are split over, static under jit; None: not split. Set by `solvers.sharding`.
    """

    x: Float[Array, "*batch d p"]
    y: Float[Array, "*batch d n"]
    bias: Float[Array, "*batch n"]
    response: Float[Array, "*batch d n"] | None = None
    offset: Float[Array, "*batch d n"] | None = None
    weights: Float[Array, "*batch n"] | None = None
    activation: Activation = field(default=RELU, metadata={"static": True})
    mesh: Mesh | None = field(default=None, metadata={"static": True})


T = TypeVar("T")


def sum_over_chunks(
    body: Callable[..., T], rows: tuple[Array | None, ...], chunk: int = CHUNK_ROWS, *, mesh: Mesh | None = None
) -> T:
    """Sum over chunks c of body(*rows[c]), so that temporaries never exceed `chunk` rows.

    `rows` share their first axis d (None entries are passed through). Whole chunks go through one `lax.scan`,
    the remainder through one more call of `body`, so no padding enters the sum. With a mesh each device sums over its
    own rows, in chunks, and the sums are then added up: one reduction of the result's size, however many chunks.
    """
    if mesh is None:
        return _sum_of_own(body, rows, chunk, ())
    axes = mesh.axis_names

    def own(*part: Array | None) -> T:
        return lax.psum(_sum_of_own(body, part, chunk, axes), axes)

    return jax.shard_map(own, mesh=mesh, in_specs=PartitionSpec(axes), out_specs=PartitionSpec())(*rows)


def _sum_of_own(body: Callable[..., T], rows: tuple[Array | None, ...], chunk: int, axes: tuple[str, ...]) -> T:
    """The sum over the rows of one device; `axes` are those of the mesh that it varies over."""
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
    zero = lax.pcast(zero, axes, to="varying") if axes else zero
    total, _ = lax.scan(step, zero, jnp.arange(whole))
    return total if tail is None else jax.tree.map(jnp.add, total, tail)


def preactivation(
    x: Float[Array, "rows p"],
    m: Float[Array, "n p"],
    bias: Float[Array, " n"],
    offset: Float[Array, "rows n"] | None,
) -> Float[Array, "rows n"]:
    """The response z = x m' + bias + offset."""
    z = x @ m.T + bias[None, :]
    return z if offset is None else z + offset


def target_energy(problem: LayerProblem) -> Float[Array, ""]:
    """|| W^(1/2) y ||_F^2, or 1 when y is zero, so that dividing by it is always safe."""
    per_output = sum_over_chunks(lambda y: jnp.sum(y * y, axis=0), (problem.y,), mesh=problem.mesh)
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

    per_output = sum_over_chunks(body, (problem.x, problem.y, problem.offset), mesh=problem.mesh)
    return jnp.sum(per_output if problem.weights is None else per_output * problem.weights)


def relative_error(
    problem: LayerProblem, m: Float[Array, "n p"], bias: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """|| y - r(x m' + bias + offset) ||^2 / || y ||^2, both weighted: squared relative error after the activation."""
    return residual_energy(problem, m, bias) / target_energy(problem)


def loss(problem: LayerProblem, m: Float[Array, "n p"]) -> Float[Array, ""]:
    """L(m), the first line of this file."""
    return jnp.asarray(0.5, problem.x.dtype) * relative_error(problem, m)


def descent_residual(
    activation: Activation,
    y: Float[Array, "rows n"],
    z: Float[Array, "rows n"],
    pull: bool | Bool[Array, ""] = True,
) -> Float[Array, "rows n"]:
    """T - z: minus the gradient of the loss (before dividing by its energy) with respect to the response z.

    No activation: T = y. ReLU with y >= 0: T = z where z < 0 and y otherwise, so that 1/2 ||T - z'||^2 plus a constant
    majorises the loss and touches it at z' = z. With `pull`, T = y also where y > 0 > z: there the loss is flat and the
    bound does not touch, but outputs that should be active are drawn back. Any other activation: r'(z)(y - r(z)).
    """
    if activation == IDENTITY:
        return y - z
    if activation == RELU:
        return jnp.where((z >= 0) | (pull & (y > 0)), y - z, 0)
    response, pullback = jax.vjp(activation, z)
    return pullback(y - response)[0]


def surrogate_gradient(problem: LayerProblem, m: Float[Array, "n p"]) -> Float[Array, "n p"]:
    """The gradient at m of the loss's surrogate (with `pull`): -(T - z)' x / ||y||^2, outputs weighted."""

    def body(x: Array, y: Array, offset: Array | None) -> Array:
        z = preactivation(x, m, problem.bias, offset)
        return descent_residual(problem.activation, y, z).T @ x

    total = sum_over_chunks(body, (problem.x, problem.y, problem.offset), mesh=problem.mesh)
    total = -total / target_energy(problem)
    return total if problem.weights is None else total * problem.weights[:, None]


def scale_features(problem: LayerProblem) -> tuple[LayerProblem, Float[Array, " p"]]:
    """The problem in features of equal energy: x D^-1 and D's diagonal, D = diag(x'x)^(1/2) divided by its root mean
    square (1 for features that are always zero). m solves the original problem where m D solves this one. Copies x.
    """
    energy = sum_over_chunks(lambda x: jnp.sum(x * x, axis=0), (problem.x,), mesh=problem.mesh)
    mean = jnp.mean(energy)
    scale = jnp.where(energy > 0, jnp.sqrt(energy / jnp.where(mean > 0, mean, 1)), 1)
    return replace(problem, x=problem.x / scale[None, :]), scale


def is_concrete(value: object) -> bool:
    """False for a value that is being traced by jit, vmap or grad, whose entries cannot be looked at."""
    return not isinstance(value, Tracer)


def _expected_shapes(problem: LayerProblem) -> dict[str, tuple[int, ...]]:
    d, p = problem.x.shape
    n = problem.bias.shape[0]
    return {"x": (d, p), "y": (d, n), "bias": (n,), "response": (d, n), "offset": (d, n), "weights": (n,)}


def validate(problem: LayerProblem) -> None:
    """Checks a problem on the host, before any work: shapes and dtypes always, values where they are not traced.

    Raises:
        ValueError: an array has a wrong shape or dtype, is empty, holds NaN or Inf, or a weight is negative.
    """
    if problem.x.ndim != 2 or problem.bias.ndim != 1:
        raise ValueError(
            f"x has shape {problem.x.shape} and bias {problem.bias.shape}: pass im2col rows (d, p) and a bias (n,)"
        )
    for name, shape in _expected_shapes(problem).items():
        array = getattr(problem, name)
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} from x (d, p) and bias (n,)")
        if 0 in shape:
            raise ValueError(f"{name} is empty (shape {shape}): pass at least one row, one feature and one output")
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype != problem.x.dtype:
            raise ValueError(
                f"{name} has dtype {array.dtype}: all arrays must have x's floating dtype {problem.x.dtype}"
            )
        # The sum of finite values can overflow but never hides a NaN or an Inf; look closer only if it is not finite.
        if is_concrete(array) and not np.isfinite(jnp.sum(array)) and not jnp.all(jnp.isfinite(array)):
            raise ValueError(f"{name} holds NaN or Inf: remove the offending rows or repair the network")
    if problem.weights is not None and is_concrete(problem.weights) and np.min(problem.weights) < 0:
        raise ValueError(f"weights has a negative entry ({np.min(problem.weights)}): pass weights >= 0")
