"""The inner factors of Tucker-2 and CP, chosen on the layer's output: second moments of inputs and target.

What a factored convolution computes from its input is a set of features, each a fixed combination of the patch: for
Tucker-2 every place of the window times every inner channel, for CP one per component. The last factor is then least
squares (of given rank, for Tucker-2). So only the features are unknown:

1. with the Gram matrix approximated by a Kronecker product over the modes of the kernel, whitening each mode turns the
   problem into the plain decomposition of a tensor (`solvers.tensor`);
2. from there L-BFGS minimises the exact error, the last factor eliminated (as `solvers.spatial_factor` does).

With an identity in place of the Gram matrix both steps are the decomposition of the weights.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from solvers.gram import GramStatistics
from solvers.lbfgs import minimise
from solvers.spatial_factor import Moments, fit_first, kronecker
from solvers.tensor import QUICK, CpOptions, balanced, cp, products, tucker2


@dataclass(frozen=True)
class FeatureOptions:
    """Static options.

    Attributes:
        sweeps: of the orthogonal iteration.
        cp: of the alternating least squares.
        steps: of L-BFGS on the exact error, at most.
        memory: pairs that L-BFGS remembers.
        rtol: L-BFGS stops when a step lowers the error by less than this fraction of it.
    """

    sweeps: int = 8
    cp: CpOptions = CpOptions(sweeps=100)
    steps: int = 60
    memory: int = 8
    rtol: float = 1e-5

    @classmethod
    def for_size(cls, p: int) -> "FeatureOptions":
        """The defaults up to p = 1500; above, where a step takes seconds, fewer of everything."""
        return cls() if p <= 1500 else cls(sweeps=4, cp=CpOptions(sweeps=40, restarts=1), steps=10, rtol=1e-3)


def whitened_tensor(gram: Float[Array, "p p"], w: Float[Array, "n p"], q: int) -> Float[Array, "n rows q"]:
    """W as a tensor whose squared norm is about the energy of its response: gram ~ (rows x rows) (x) (q x q)."""
    half, chol = kronecker(gram, q)
    return jnp.einsum("oic,ij,cd->ojd", w.reshape(w.shape[0], -1, q), half, chol, optimize="greedy")


@partial(jax.jit, static_argnames=("places", "size", "options"), compiler_options=QUICK)
def tucker2_inputs(
    stats: GramStatistics,
    w: Float[Array, "n p"],
    ranks: Int[Array, "2"],
    *,
    places: int,
    size: tuple[int, int],
    options: FeatureOptions = FeatureOptions(),
) -> Float[Array, "r_in c_in"]:
    """argmin over the first factor of the error that is left with the best core and last factor of rank ranks[0].

    Args:
        stats: moments, with a ridge.
        w: (n, p), the least-squares matrix of the same moments.
        ranks: (outputs, inputs), traced, at most `size`.
        places: of the window.
        size: static; rows beyond ranks[1] are zero.
        options: static.
    """
    p = w.shape[1]
    ranks = ranks.astype(jnp.int32)
    white = whitened_tensor(stats.gram, w, p // places)
    inner = tucker2(white, ranks, size=size, sweeps=options.sweeps).inner
    chol = kronecker(stats.gram, p // places)[1]
    first = solve_triangular(chol, inner, lower=True, trans="T").T
    used = jnp.arange(size[1], dtype=jnp.int32) < ranks[1]
    limits = {"max_steps": options.steps, "memory": options.memory, "rtol": options.rtol}
    moments = Moments(stats.gram, stats.cross)
    return fit_first(first, moments, used, stats.target_energy, rank=ranks[0], **limits)[0]


Whiteners = tuple[Float[Array, "_ _"], ...]


def _whiteners(gram: Float[Array, "p p"], modes: tuple[int, ...]) -> Whiteners:
    """One matrix t per mode with gram ~ t1 t1' (x) t2 t2' (x) ..., the last mode fastest."""
    if len(modes) == 1:
        level = jnp.trace(gram) / modes[0]
        return (jnp.linalg.cholesky(gram + 1e-6 * level * jnp.eye(modes[0], dtype=gram.dtype)),)
    outer, last = kronecker(gram, modes[-1])
    return (*_whiteners(outer @ outer.T, modes[:-1]), last)


def _unwhitened(stacked: Float[Array, "r m"], whiteners: Whiteners) -> tuple[Float[Array, "r _"], ...]:
    """The factors themselves, from their whitened forms side by side."""
    ends = [0]
    for t in whiteners:
        ends.append(ends[-1] + len(t))
    parts = [stacked[:, a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return tuple(solve_triangular(t, f.T, lower=True, trans="T").T for t, f in zip(whiteners, parts, strict=True))


def last_factor(
    features: Float[Array, "r p"], moments: Moments, used: Bool[Array, " r"]
) -> tuple[Float[Array, "n r"], Float[Array, "r p"], Float[Array, "n r"]]:
    """(last, filtered, aim): argmin over last of E||T - last features x||^2, features gram, cross features'.

    Features of unit energy get a ridge of some rounding errors: components may be nearly the same.
    """
    dtype = features.dtype
    filtered, aim = features @ moments.gram, moments.cross @ features.T
    inner = filtered @ features.T
    size = jnp.sqrt(jnp.where(used, jnp.diagonal(inner), 1))
    size = jnp.where(size > 0, size, 1)
    ridge = jnp.where(used, 0.03 * float(jnp.finfo(dtype).eps) ** 0.5, 1).astype(dtype)
    chol = jnp.linalg.cholesky(inner / size[:, None] / size[None, :] + jnp.diag(ridge))
    return cho_solve((chol, True), aim.T / size[:, None]).T / size[None, :], filtered, aim


@partial(jax.jit, static_argnames=("modes", "size", "options"), compiler_options=QUICK)
def cp_features(
    stats: GramStatistics,
    w: Float[Array, "n p"],
    rank: Int[ArrayLike, ""],
    *,
    modes: tuple[int, ...],
    size: int,
    options: FeatureOptions = FeatureOptions(),
) -> tuple[Float[Array, "r _"], ...]:
    """argmin over all factors but the last of the error that is left with the best last factor; a local one.

    Args:
        stats: moments, with a ridge.
        w: (n, p), the least-squares matrix of the same moments.
        rank: components, traced, at most `size`.
        modes: sizes of the kernel's modes but the outputs: (places, c_in) or (kh, kw, c_in).
        size: static; rows beyond the rank are zero.
        options: static.

    Returns:
        One factor (size, m) for each of the modes.
    """
    n, dtype = w.shape[0], w.dtype
    moments, whiteners = Moments(stats.gram, stats.cross), _whiteners(stats.gram, modes)
    used = jnp.arange(size, dtype=jnp.int32) < jnp.asarray(rank, jnp.int32)
    white = w.reshape(n, *modes)
    for axis, t in enumerate(whiteners, 1):
        white = jnp.moveaxis(jnp.tensordot(white, t, axes=(axis, 0)), -1, axis)
    factors = cp(white, rank, size=size, options=options.cp)[0]
    # A row as long as its component makes the curvature in it about 2, whatever the component's size.
    lengths = [jnp.linalg.norm(f, axis=1, keepdims=True) for f in factors]
    energy = lengths[0]
    for length in lengths[1:]:
        energy = energy * length
    rows = [f * energy / jnp.where(ln > 0, ln, 1) for f, ln in zip(factors[1:], lengths[1:], strict=True)]

    def evaluate(stacked: Float[Array, "r m"]) -> tuple[Float[Array, ""], Float[Array, "r m"]]:
        found, back = jax.vjp(lambda rows: products(_unwhitened(rows, whiteners)), stacked)
        last, filtered, aim = last_factor(found, moments, used)
        gradient = back(-2 * last.T @ (moments.cross - last @ filtered))[0]
        return -jnp.sum(last * aim), gradient * used.astype(dtype)[:, None]

    limits = {"max_steps": options.steps, "memory": options.memory, "rtol": options.rtol}
    start = jnp.concatenate(rows, axis=1)
    end, _ = minimise(evaluate, start, offset=stats.target_energy, curvature=2.0, **limits)
    return balanced(_unwhitened(end, whiteners))
