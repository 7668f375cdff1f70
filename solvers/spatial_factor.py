"""The first factor of a spatial pair, by minimising over it what is left when the second factor is eliminated.

With b (r, q) fixed, q = kw * c_in, the features are T = I_kh (x) b and the second factor s (n, kh r) is least squares.
Everything here works on the moments gram (p, p) and cross (n, p), p = kh q, of inputs and target.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Bool, Float, Int

from solvers.lbfgs import minimise
from solvers.structure import truncate_rank


class Moments(NamedTuple):
    """Second moments of the inputs and of target with inputs."""

    gram: Float[Array, "p p"]
    cross: Float[Array, "n p"]


class FeatureMoments(NamedTuple):
    """Second moments of the features T = I_kh (x) b, kernel row slowest: T gram T', T gram, cross T'."""

    inner: Float[Array, "kr kr"]
    filtered: Float[Array, "kr p"]
    aim: Float[Array, "n kr"]


def feature_moments(first: Float[Array, "r q"], moments: Moments) -> FeatureMoments:
    """Moments of the features, block by block: r p^2 multiplications."""
    (r, q), p, n = first.shape, moments.gram.shape[0], moments.cross.shape[0]
    rows = p // q
    filtered = jnp.einsum("sq,iqp->isp", first, moments.gram.reshape(rows, q, p)).reshape(rows * r, p)
    inner = jnp.einsum("ajq,tq->ajt", filtered.reshape(rows * r, rows, q), first).reshape(rows * r, rows * r)
    aim = jnp.einsum("ojq,tq->ojt", moments.cross.reshape(n, rows, q), first).reshape(n, rows * r)
    return FeatureMoments(inner, filtered, aim)


def second_factor(
    found: FeatureMoments, used: Bool[Array, " r"], ridge: Float[Array, ""], rank: Int[Array, ""] | None = None
) -> Float[Array, "n kr"]:
    """argmin over s (of that rank) of E||T - phi s'||^2 + ridge ||s||^2; unused features are zero and get zero."""
    copies = found.inner.shape[0] // used.shape[0]
    inner = found.inner + jnp.diag(jnp.tile(jnp.where(used, ridge, jnp.ones_like(ridge)), copies))
    chol = jnp.linalg.cholesky(inner)
    if rank is None:
        return cho_solve((chol, True), found.aim.T).T
    kept = truncate_rank(solve_triangular(chol, found.aim.T, lower=True).T, rank)
    return solve_triangular(chol, kept.T, lower=True, trans="T").T


def eliminated_objective(
    first: Float[Array, "r q"],
    moments: Moments,
    used: Bool[Array, " r"],
    ridge: Float[Array, ""],
    rank: Int[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "r q"]]:
    """min over the second factor s (of that rank) of E||T - x (s T)'||^2 + ridge ||s||^2, less E||T||^2; its gradient.

    By the envelope theorem the gradient is that with s held fixed: the sum over kernel rows i of -2 s_i' (C - M G)_i.
    """
    r, q = first.shape
    found = feature_moments(first, moments)
    second = second_factor(found, used, ridge, rank)
    n, rows = second.shape[0], second.shape[1] // r
    residual = (moments.cross - second @ found.filtered).reshape(n, rows, q)
    gradient = -2 * jnp.einsum("nis,niq->sq", second.reshape(n, rows, r), residual)
    return -jnp.sum(second * found.aim), gradient


def mean_block(gram: Float[Array, "p p"], q: int) -> Float[Array, "q q"]:
    """Mean of the diagonal q x q blocks: the Gram matrix of one kernel row; a little ridge keeps it definite."""
    rows = gram.shape[0] // q
    block = jnp.einsum("iqit->qt", gram.reshape(rows, q, rows, q)) / rows
    level = jnp.trace(block) / q
    ridge = jnp.sqrt(jnp.finfo(gram.dtype).eps) * jnp.asarray(0.03, gram.dtype) * level
    return block + jnp.where(level > 0, ridge, jnp.ones_like(level)) * jnp.eye(q, dtype=gram.dtype)


def kronecker(gram: Float[Array, "p p"], q: int) -> tuple[Float[Array, "rows rows"], Float[Array, "q q"]]:
    """(h, l) with gram ~ h h' (x) l l', rows x one row: l l' is the mean block, h h' what that leaves; l is lower."""
    rows = gram.shape[0] // q
    chol = jnp.linalg.cholesky(mean_block(gram, q))
    inverse = cho_solve((chol, True), jnp.eye(q, dtype=gram.dtype))
    between = jnp.einsum("iajb,ab->ij", gram.reshape(rows, q, rows, q), inverse) / q
    values, vectors = jnp.linalg.eigh(between)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :], chol


def weighted_svd(
    w: Float[Array, "n p"], gram: Float[Array, "p p"], q: int, max_rank: int
) -> Float[Array, "max_rank q"]:
    """Top right singular vectors of the (kh n, q) unfolding of w, weighted by gram ~ A (x) B (rows x one row)."""
    n, p = w.shape
    half, chol = kronecker(gram, q)
    unfolded = jnp.einsum("ij,niq->njq", half, w.reshape(n, p // q, q)).reshape(-1, q) @ chol
    right = jnp.linalg.eigh(unfolded.T @ unfolded)[1][:, ::-1][:, :max_rank]
    return solve_triangular(chol, right, lower=True, trans="T").T


def orthonormal(
    vectors: Float[Array, "r cols"], inner: Float[Array, "r r"], used: Bool[Array, " r"]
) -> Float[Array, "r cols"]:
    """Rows recombined so that `inner`, their Gram matrix, becomes the identity."""
    jitter = jnp.asarray(10 * jnp.finfo(inner.dtype).eps, inner.dtype) * jnp.diagonal(inner)
    chol = jnp.linalg.cholesky(inner + jnp.diag(jnp.where(used, jitter, jnp.ones_like(jitter))))
    return solve_triangular(chol, vectors, lower=True)


def fit_first(
    first: Float[Array, "r q"],
    moments: Moments,
    used: Bool[Array, " r"],
    energy: Float[Array, ""],
    *,
    max_steps: int,
    memory: int,
    rtol: float,
    rank: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "r q"], Float[Array, ""]]:
    """argmin over b of the eliminated objective, and its value, from `first`, where its Hessian is nearly 2 I.

    With a `rank` the second factor has at most that one.

    The unknown is R b L: L L' is the mean Gram block, and R'R = sum_i s_i' s_i makes the second factor orthonormal.
    In these coordinates 10-20 steps do what takes hundreds in the plain ones.
    """
    dtype, r = first.dtype, first.shape[0]
    block = mean_block(moments.gram, first.shape[1])
    chol = jnp.linalg.cholesky(block)
    inverse = solve_triangular(chol, jnp.eye(block.shape[0], dtype=dtype), lower=True)
    first = orthonormal(first, first @ block @ first.T, used)
    ridge = jnp.asarray(10 * jnp.finfo(dtype).eps, dtype)  # relative: the features have unit energy
    second = second_factor(feature_moments(first, moments), used, ridge, rank).reshape(-1, r)
    inner = second.T @ second
    energies = jnp.sum(jnp.diagonal(inner))
    floor = jnp.where(energies > 0, jnp.asarray(1e-6, dtype) * energies / r, jnp.ones_like(energies))
    balance = jnp.linalg.cholesky(inner + jnp.diag(jnp.where(used, floor, jnp.ones_like(floor)))).T
    mean_energy = energies / jnp.maximum(jnp.sum(used), 1).astype(dtype)
    ridge = ridge * jnp.where(mean_energy > 0, mean_energy, jnp.ones_like(mean_energy))

    def evaluate(b: Float[Array, "r q"]) -> tuple[Float[Array, ""], Float[Array, "r q"]]:
        value, gradient = eliminated_objective(b @ inverse, moments, used, ridge, rank)
        return value, gradient @ inverse.T

    b, value = minimise(
        evaluate,
        balance @ first @ chol,
        offset=energy,
        curvature=2.0,
        max_steps=max_steps,
        memory=memory,
        rtol=rtol,
    )
    return b @ inverse, value
