"""Proximal operators and projections, as pure functions that can be jitted, vmapped and swept without recompiling.

Sources: Parikh & Boyd, "Proximal algorithms" (2014), chapter 6; Cai, Candes & Shen, "A singular value thresholding
algorithm for matrix completion" (2010), theorem 2.1; Eckart & Young (1936) for the projection on rank r.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int


@dataclass(frozen=True)
class Grouping:
    """A partition of the entries of an (n, p) matrix into groups of equal size, hashable: static under `jax.jit`.

    The matrix is seen as (n, p / block, block); a group holds the entries that differ only along `axes` of that view.
    Use `COLUMNS`, `ROWS`, `ENTRIES` or `channels(c_in)`; `CHANNELS` stands for the last until the layer is known.

    Attributes:
        name: what one group is called in messages.
        axes: the axes of the view that run inside a group.
        block: length of the view's last axis; None stands for p.
    """

    name: str
    axes: tuple[int, ...]
    block: int | None = None

    def _view(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        n, p = shape
        block = self.block or p
        if p % block:
            raise ValueError(
                f"grouping {self.name}: p={p} columns are not a multiple of c_in={block}; columns are ordered "
                "(window position, channel), so pass the layer's number of input channels"
            )
        return n, p // block, block

    def count(self, shape: tuple[int, ...]) -> int:
        """Number of groups of an (n, p) matrix."""
        count = 1
        for axis, size in enumerate(self._view(shape)):
            count *= 1 if axis in self.axes else size
        return count

    def max_rank(self, shape: tuple[int, ...]) -> int:
        """The largest rank that a matrix with a single non-zero group can have."""
        rows, positions, block = (size if axis in self.axes else 1 for axis, size in enumerate(self._view(shape)))
        return min(rows, positions * block)

    def norms(self, v: Float[Array, "n p"]) -> Float[Array, " groups"]:
        """The Euclidean norm of each group."""
        view = v.reshape(self._view(v.shape))
        return jnp.sqrt(jnp.sum(view * view, axis=self.axes)).reshape(-1)

    def expand(
        self, values: Float[Array, " groups"] | Bool[Array, " groups"], shape: tuple[int, ...]
    ) -> Float[Array, "n p"] | Bool[Array, "n p"]:
        """An (n, p) matrix that holds, at each entry, its group's value."""
        view = self._view(shape)
        kept = tuple(1 if axis in self.axes else size for axis, size in enumerate(view))
        return jnp.broadcast_to(values.reshape(kept), view).reshape(shape)


COLUMNS = Grouping("columns", (0, 1))
ROWS = Grouping("rows", (1, 2))
ENTRIES = Grouping("entries", ())
CHANNELS = Grouping("channels", (0, 1))


def channels(c_in: int) -> Grouping:
    """Groups of all columns of one input channel: columns c, c + c_in, c + 2 c_in, ... of every row.

    Raises:
        ValueError: c_in below 1.
    """
    if c_in < 1:
        raise ValueError(f"c_in={c_in}: pass the layer's number of input channels, at least 1")
    return Grouping("channels", (0, 1), c_in)


def group_soft_threshold(
    v: Float[Array, "n p"], tau: Float[ArrayLike, ""], grouping: Grouping = COLUMNS
) -> Float[Array, "n p"]:
    """argmin_a  tau * sum_g ||a_g||_2 + 1/2 ||a - v||_F^2, over the groups g of `grouping`.

    Groups of norm <= tau become exactly zero; a zero group stays zero, without 0/0. With `ENTRIES` this is the
    soft threshold of the l1 norm, with `COLUMNS` the prox of the l2,1 norm. Parikh & Boyd (2014), section 6.5.4.
    """
    norms = grouping.norms(v)
    shrink = jnp.where(norms > tau, 1 - tau / jnp.where(norms > 0, norms, 1), 0)
    return v * grouping.expand(shrink, v.shape)


def soft_threshold(v: Float[Array, "n p"], tau: Float[ArrayLike, ""]) -> Float[Array, "n p"]:
    """argmin_a  tau * sum_ij |a_ij| + 1/2 ||a - v||_F^2. Parikh & Boyd (2014), section 6.5.2."""
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - tau, 0)


def project_groups(
    v: Float[Array, "n p"], num_kept: Int[ArrayLike, ""], grouping: Grouping = COLUMNS
) -> Float[Array, "n p"]:
    """argmin_a  1/2 ||a - v||_F^2  subject to at most `num_kept` groups of a being non-zero.

    Keeps the groups of largest norm; equal norms are kept in the order of their index. `num_kept` may be traced.
    """
    norms, num_kept = grouping.norms(v), jnp.asarray(num_kept)
    threshold = -jnp.sort(-norms)[jnp.clip(num_kept - 1, 0, norms.size - 1)]
    above = norms > threshold
    tied = norms == threshold
    kept = above | (tied & (jnp.cumsum(tied) <= num_kept - jnp.sum(above)))
    return jnp.where(grouping.expand(kept & (num_kept > 0), v.shape), v, 0)


def _left_factors(v: Float[Array, "small large"]) -> tuple[Array, Array, Array]:
    """Left singular vectors u, u'v, and the singular values, decreasing, from the Gram matrix of the smaller side.

    The square roots of the Gram matrix's eigenvalues would be noise below sqrt(eps) sigma_1 (3.5e-4 sigma_1 in
    float32). The norms of the rows of u'v are taken instead: below that level they mix the directions there with each
    other, but stay of their size.
    """
    _, u = jnp.linalg.eigh(jnp.matmul(v, v.T, precision="highest"))
    u = u[:, ::-1]
    coefficients = jnp.matmul(u.T, v, precision="highest")
    return u, coefficients, jnp.sqrt(jnp.sum(coefficients * coefficients, axis=1))


def _scale_singular_values(v: Array, scale_of: Array, u: Array, coefficients: Array) -> Array:
    out = jnp.matmul(u, scale_of[:, None] * coefficients, precision="highest")
    return out if out.shape == v.shape else out.T


def singular_value_threshold(
    v: Float[Array, "n p"], tau: Float[ArrayLike, ""]
) -> tuple[Float[Array, "n p"], Float[Array, " min_np"]]:
    """argmin_b  tau * ||b||_* + 1/2 ||b - v||_F^2, with ||.||_* the nuclear norm (sum of singular values).

    Cai, Candes & Shen (2010), theorem 2.1. Only the Gram matrix of the smaller side is decomposed. In float32 the
    eigenvectors that belong to singular values below 3.5e-4 sigma_1 are mixed with each other, so with a threshold
    below that the smallest directions are shrunk as a group rather than one by one.

    Returns:
        b, and its singular values (those of v minus tau, not below 0, in decreasing order of v's).
    """
    u, coefficients, sigma = _left_factors(v if v.shape[0] <= v.shape[1] else v.T)
    shrunk = jnp.maximum(sigma - tau, 0)
    return _scale_singular_values(v, shrunk / jnp.where(sigma > 0, sigma, 1), u, coefficients), shrunk


def project_rank(
    v: Float[Array, "n p"], rank: Int[ArrayLike, ""]
) -> tuple[Float[Array, "n p"], Float[Array, " min_np"]]:
    """argmin_b  1/2 ||b - v||_F^2  subject to rank(b) <= `rank`, which may be traced. Eckart & Young (1936).

    Returns:
        b, and its singular values (those of v with all after the first `rank` set to 0).
    """
    u, coefficients, sigma = _left_factors(v if v.shape[0] <= v.shape[1] else v.T)
    kept = (jnp.arange(sigma.size) < rank).astype(v.dtype)
    return _scale_singular_values(v, kept, u, coefficients), sigma * kept
