"""What a compressed form keeps, and the closed-form refit with that structure fixed.

Every form is a set of features phi = T x of the layer's input: some *free* (each output has its own coefficient),
the others reached only through a factor of rank r. Columns alone, low rank alone, the sum of both, the two-level form
and spatial low rank + columns are all of this kind. Reduced-rank regression with a free block of regressors
(Anderson 1951) then gives the optimum in closed form.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Structure:
    """The features of a form, whitened, so that fitting any target is two products and one small eigenproblem.

    Attributes:
        whiten: (p, p); row i is the i-th whitened feature as a combination of inputs, zero for what is dropped:
            L^-1 T with T gram T' = L L', free features first.
        free: (p,), whether whitened feature i is free; the others are reached through the rank-r factor.
        rank: r, a traced integer, 0 when nothing is reached through a factor.
    """

    whiten: Float[Array, "p p"]
    free: Bool[Array, " p"]
    rank: Int[Array, ""]

    def astype(self, dtype: jnp.dtype | type) -> "Structure":
        """The same structure in another precision."""
        return Structure(whiten=self.whiten.astype(dtype), free=self.free, rank=self.rank)


def truncate_rank(tail: Float[Array, "n p"], rank: Int[Array, ""]) -> Float[Array, "n p"]:
    """Best rank-`rank` approximation, through the eigenvectors of the smaller Gram matrix."""
    n, p = tail.shape
    small = tail @ tail.T if n <= p else tail.T @ tail
    vectors = jnp.linalg.eigh(small)[1]
    size = small.shape[0]
    vectors = vectors * (jnp.arange(size, dtype=rank.dtype) >= size - rank).astype(tail.dtype)[None, :]
    return vectors @ (vectors.T @ tail) if n <= p else (tail @ vectors) @ vectors.T


def fit(
    structure: Structure, cross: Float[Array, "n p"], weights: Float[Array, " n"] | None = None
) -> Float[Array, "n p"]:
    """argmin over m of this structure of mean ||W^(1/2) (T - x m')||^2, given cross = mean of T x' (centred).

    Args:
        structure: what is kept.
        cross: (n, p), the target's covariance with the inputs.
        weights: positive weight of each output; it changes only what the rank-r factor keeps.

    Returns:
        The matrix (n, p); exactly zero on dropped columns.
    """
    scale = jnp.ones((cross.shape[0], 1), cross.dtype) if weights is None else jnp.sqrt(weights)[:, None]
    scale = jnp.where(scale > 0, scale, jnp.finfo(cross.dtype).tiny ** 0.5)
    z = cross @ structure.whiten.T
    tail = jnp.where(structure.free[None, :], jnp.zeros_like(z), z)
    kept = jax.lax.cond(structure.rank > 0, truncate_rank, lambda v, r: jnp.zeros_like(v), tail * scale, structure.rank)
    return (z - tail + kept / scale) @ structure.whiten


def column_structure(
    gram: Float[Array, "p p"],
    free: Bool[Array, " p"],
    tail: Bool[Array, " p"],
    rank: Int[Array, ""] | int,
) -> Structure:
    """Structure of a (on the columns `free`) plus u v (v on the columns `tail` only): the two-level form.

    Args:
        gram: (p, p), centred, positive definite on the kept columns.
        free: S1, the columns that every output may use freely.
        tail: S2 minus S1, the columns that only v reads (overlap with `free` is ignored).
        rank: inner dimension of u v. `tail` empty: pure columns. `free` empty: low rank.
    """
    p = gram.shape[0]
    level = jnp.where(free, 0, jnp.where(tail, 1, 2))
    order = jnp.argsort(level, stable=True)
    kept = level[order] < 2
    both = kept[:, None] & kept[None, :]
    eye = jnp.eye(p, dtype=gram.dtype)
    chol = jnp.linalg.cholesky(jnp.where(both, gram[order][:, order], eye))
    inverse = solve_triangular(chol, eye * kept.astype(gram.dtype)[None, :], lower=True)
    whiten = inverse[:, jnp.argsort(order)]
    rank = jnp.asarray(rank, jnp.int32)
    return Structure(whiten=whiten, free=jnp.arange(p) < jnp.sum(free), rank=rank)


def feature_structure(
    gram: Float[Array, "p p"], features: Float[Array, "q p"], kept: Bool[Array, " q"], jitter: float = 1e-9
) -> Structure:
    """Structure whose free features are the rows of `features` flagged in `kept`; at most p of them count.

    Args:
        gram: (p, p), centred.
        features: candidate features as combinations of inputs, (q, p).
        kept: which of them the form has.
        jitter: relative ridge on the features' own Gram matrix, which may be nearly dependent; at least 10 rounding
            errors unless 0.
    """
    p = gram.shape[0]
    order = jnp.argsort(jnp.logical_not(kept), stable=True)[:p]
    rows = features[order] * kept[order].astype(gram.dtype)[:, None]
    flags = kept[order]
    if rows.shape[0] < p:
        missing = p - rows.shape[0]
        rows = jnp.concatenate([rows, jnp.zeros((missing, p), gram.dtype)])
        flags = jnp.concatenate([flags, jnp.zeros(missing, bool)])
    inner = rows @ gram @ rows.T
    jitter = max(jitter, 10 * float(jnp.finfo(gram.dtype).eps)) if jitter else 0.0
    diagonal = jnp.where(flags, jnp.asarray(jitter, gram.dtype) * jnp.diagonal(inner), jnp.ones(p, gram.dtype))
    chol = jnp.linalg.cholesky(inner + jnp.diag(diagonal))
    whiten = solve_triangular(chol, rows, lower=True)
    return Structure(whiten=whiten, free=flags, rank=jnp.zeros((), jnp.int32))
