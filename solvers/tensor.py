"""Tucker-2 and canonical (CP) decompositions of a convolution's kernel, least squares on its weights.

A kernel is a tensor (n, places, c_in): outputs, positions in the window, input channels. Ranks are traced and arrays
padded to a static size, so that other ranks compile nothing. Nothing larger than the tensor itself times the rank is
ever formed, and no singular vectors of an unfolding: only eigenvectors of the n x n and c_in x c_in Gram matrices.

Measured beside tensorly 0.10 on one core: its `partial_tucker` takes 4 times as long on 256 x 9 x 256 and minutes on
512 x 9 x 512, its `parafac` 0.2 s a sweep at rank 256 of 256 x 9 x 256, and neither is compiled, weighted, damped or
restarted. The functions are to be jitted by their callers.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, ArrayLike, Bool, Float, Int

QUICK = {"xla_backend_optimization_level": 0}  # compiling many small loops costs more than they ever run
_LETTERS = "abcd"


class Bases(NamedTuple):
    """Orthonormal bases of a Tucker-2 decomposition; columns beyond the ranks are zero.

    Attributes:
        outer: (n, size of the outputs' basis).
        inner: (c_in, size of the inputs' basis).
        energy: squared norm of the decomposition, which is the tensor's minus the squared error.
    """

    outer: Float[Array, "n r_out"]
    inner: Float[Array, "c_in r_in"]
    energy: Float[Array, ""]


def padded(rank: int, most: int) -> int:
    """A static size for a rank: at least it, at most `most`, one of about four, so that few sizes are compiled."""
    step = max(1, -(-most // 4))
    return min(-(-rank // step) * step, most)


def leading(gram: Float[Array, "m m"], rank: Int[ArrayLike, ""], size: int) -> Float[Array, "m size"]:
    """The eigenvectors of the `rank` largest eigenvalues, largest first; zero columns up to `size`."""
    vectors = jnp.linalg.eigh(gram)[1][:, ::-1][:, :size]
    used = jnp.arange(size, dtype=jnp.int32) < jnp.asarray(rank, jnp.int32)
    return jnp.where(used[None, :], vectors, 0)


def tucker2(
    tensor: Float[Array, "n places c_in"],
    ranks: Int[Array, "2"],
    *,
    size: tuple[int, int],
    sweeps: int = 8,
    inner: Float[Array, "c_in r_in"] | None = None,
) -> Bases:
    """Higher-order orthogonal iteration: bases that keep most of the tensor's energy, each in turn the best.

    De Lathauwer, De Moor & Vandewalle, On the best rank-1 and rank-(R1, ..., RN) approximation (2000), for two modes.
    The energy never falls from sweep to sweep.

    Args:
        tensor: (n, places, c_in).
        ranks: (outputs, inputs), traced, at most `size`.
        size: static sizes of the bases.
        sweeps: of both bases.
        inner: where to start; None: the leading eigenvectors of the inputs' Gram matrix (HOSVD).
    """
    n, _, c_in = tensor.shape
    if inner is None:
        inner = leading(jnp.einsum("osc,osd->cd", tensor, tensor), ranks[1], size[1])

    def sweep(_: Array, bases: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        few = (tensor @ bases[1]).reshape(n, -1)
        outer = leading(few @ few.T, ranks[0], size[0])
        rows = (outer.T @ tensor.reshape(n, -1)).reshape(-1, c_in)
        inner = leading(rows.T @ rows, ranks[1], size[1])
        return outer, inner, jnp.sum((rows @ inner) ** 2)

    zero = jnp.zeros((n, size[0]), tensor.dtype), inner, jnp.zeros((), tensor.dtype)
    return Bases(*lax.fori_loop(0, sweeps, sweep, zero))


@dataclass(frozen=True)
class CpOptions:
    """Static options of the alternating least squares.

    Attributes:
        sweeps: of all factors, at most.
        restarts: random starts; the best end wins.
        damping: weight at first of a factor's change, relative to the mean eigenvalue of its normal matrix. It keeps
            components from growing against each other while they are still far from the tensor.
        decay: of the damping from sweep to sweep.
        rtol: stop when a sweep lowers the error by less than this fraction of it.
        seed: of the starts.
    """

    sweeps: int = 200
    restarts: int = 2
    damping: float = 1.0
    decay: float = 0.8
    rtol: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.sweeps, self.restarts) < 1:
            raise ValueError(f"sweeps, restarts: {self.sweeps}, {self.restarts}; give at least 1 of each")
        if not (self.damping >= 0 and 0 <= self.decay < 1):
            raise ValueError(f"damping, decay: {self.damping}, {self.decay}; need damping >= 0 and decay in [0, 1)")


Factors = tuple[Float[Array, "size _"], ...]


def products(factors: Factors) -> Float[Array, "size p"]:
    """Outer products row by row, flattened, the last factor fastest: the features of CP."""
    out = factors[0]
    for factor in factors[1:]:
        out = (out[:, :, None] * factor[:, None, :]).reshape(out.shape[0], -1)
    return out


def _contract(tensor: Array, factors: Factors, mode: int) -> Array:
    """(r, m) sums over all modes but one of the tensor times the other factors, row by row."""
    modes = _LETTERS[: tensor.ndim]
    others = [i for i in range(tensor.ndim) if i != mode]
    spec = ",".join([modes, *(f"r{modes[i]}" for i in others)])
    return jnp.einsum(f"{spec}->r{modes[mode]}", tensor, *(factors[i] for i in others), optimize="greedy")


def _overlaps(factors: Factors, without: int | None = None) -> Array:
    """Inner products of the components, (r, r), the given mode left out."""
    grams = [f @ f.T for i, f in enumerate(factors) if i != without]
    return jnp.asarray(prod(grams[1:], start=grams[0]))


def balanced(factors: Factors) -> Factors:
    """The same components, each with equal norms in all modes."""
    norms = [jnp.linalg.norm(f, axis=1, keepdims=True) for f in factors]
    mean = jnp.asarray(prod(norms[1:], start=norms[0])) ** (1 / len(factors))
    return tuple(f * mean / jnp.where(norm > 0, norm, 1) for f, norm in zip(factors, norms, strict=True))


class _Sweep(NamedTuple):
    factors: Factors
    error: Float[Array, ""]
    before: Float[Array, ""]
    count: Int[Array, ""]


def _refined(tensor: Array, start: Factors, used: Bool[Array, " size"], options: CpOptions) -> tuple[Factors, Array]:
    """Damped alternating least squares from a start; the factors and the squared error."""
    dtype = tensor.dtype
    total = jnp.sum(tensor * tensor)
    count = jnp.maximum(jnp.sum(used), 1).astype(dtype)
    empty = jnp.diag(1 - used.astype(dtype))
    least = 100 * float(jnp.finfo(dtype).eps)

    def sweep(state: _Sweep) -> _Sweep:
        factors, error = list(state.factors), state.error
        strength = options.damping * options.decay ** state.count.astype(dtype)
        for mode in range(tensor.ndim):
            overlaps = _overlaps(tuple(factors), mode)
            level = jnp.trace(overlaps) / count
            shift = jnp.maximum(strength, least) * jnp.where(level > 0, level, 1)
            aim = _contract(tensor, tuple(factors), mode)
            chol = jnp.linalg.cholesky(overlaps + shift * jnp.eye(len(used), dtype=dtype) + empty)
            new = cho_solve((chol, True), aim + shift * factors[mode]) * used.astype(dtype)[:, None]
            error = total - 2 * jnp.sum(aim * new) + jnp.sum(overlaps * (new @ new.T))
            factors[mode] = new
        return _Sweep(balanced(tuple(factors)), error, state.error, state.count + 1)

    def going(state: _Sweep) -> Array:
        # While the damping is strong, small steps say nothing.
        damped = options.damping * options.decay ** state.count.astype(dtype) > 1e-2
        falling = state.before - state.error > options.rtol * state.error
        return (state.count < options.sweeps) & (damped | falling | (state.count < 2))

    infinite = jnp.full((), jnp.inf, dtype)
    end = lax.while_loop(going, sweep, _Sweep(start, infinite, infinite, jnp.zeros((), jnp.int32)))
    return end.factors, end.error


def cp(
    tensor: Float[Array, "..."],
    rank: Int[ArrayLike, ""],
    *,
    size: int,
    options: CpOptions = CpOptions(),
    start: Factors | None = None,
) -> tuple[Factors, Float[Array, ""]]:
    """Sum of `rank` outer products near the tensor, and the relative squared error.

    Minimises ||tensor - sum_r f1[r] o f2[r] o ...||^2, a local minimum, by alternating least squares in which each
    factor is held back a little at first (proximal, so that the error never rises), from random starts. Singular
    vectors of unfoldings as a start (Kolda & Bader 2009, section 3.4) need memory that large kernels do not leave, and
    gave the same errors.

    Args:
        tensor: three or four modes.
        rank: traced, at most `size`.
        size: static number of rows of the factors; rows beyond the rank are zero.
        options: static.
        start: factors to go on from, in place of random ones.

    Returns:
        One factor (size, m) per mode, each component with equal norms in all modes.
    """
    used = jnp.arange(size, dtype=jnp.int32) < jnp.asarray(rank, jnp.int32)
    total = jnp.sum(tensor * tensor)
    safe = jnp.where(total > 0, total, 1)

    def attempt(key: Array) -> tuple[Factors, Array]:
        keys = jax.random.split(key, tensor.ndim)
        scale = (safe / size) ** (0.5 / tensor.ndim)  # components of the size of the tensor's share
        factors = tuple(
            jax.random.normal(k, (size, m), tensor.dtype) * scale / m**0.5 * used.astype(tensor.dtype)[:, None]
            for k, m in zip(keys, tensor.shape, strict=True)
        )
        return _refined(tensor, factors, used, options)

    if start is not None:
        factors, error = _refined(tensor, start, used, options)
        return factors, error / safe
    all_factors, errors = lax.map(attempt, jax.random.split(jax.random.key(options.seed), options.restarts))
    best = jnp.argmin(jnp.where(jnp.isfinite(errors), errors, jnp.inf))
    return jax.tree.map(lambda f: f[best], all_factors), errors[best] / safe
