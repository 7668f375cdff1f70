"""Pivots of a symmetric matrix and of rows that go with it: the arithmetic of column selection.

Removing a column (OBS), adding one (forward selection) and exchanging columns are all pivots of a Gram matrix or of its
inverse. A pivot costs p^2 when it is multiplied out; here it costs p (steps so far) + n p, because only the pivot's
row, the diagonal and the energies of the columns are brought up to date, and the rest block by block.

References: Goodnight, A Tutorial on the SWEEP Operator (1979); Lucas, LAPACK working note 161 (2004).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Pivots:
    """Symmetric pivots of (matrix, rows) done so far, not yet multiplied out: a row is brought up to date when needed.

    The current matrix is `matrix - v' diag(sign) v + diag(shift)`, the current rows are `rows - e v`.

    Attributes:
        v: (steps, p), pivot rows divided by sqrt |pivot|.
        e: (n, steps), columns of `rows` at the pivots, divided the same way.
        sign: (steps,), signs of the pivots.
        shift: (p,), correction of the diagonal.
        diagonal: (p,), of the current matrix.
        energy: (p,), squared norms of the columns of the current rows.
        num: pivots so far.
    """

    v: Float[Array, "steps p"]
    e: Float[Array, "n steps"]
    sign: Float[Array, " steps"]
    shift: Float[Array, " p"]
    diagonal: Float[Array, " p"]
    energy: Float[Array, " p"]
    num: Int[Array, ""]

    @property
    def scores(self) -> Float[Array, " p"]:
        """energy / |diagonal|; zero where nothing but rounding is left."""
        size = jnp.abs(self.diagonal)
        safe = size > jnp.finfo(size.dtype).tiny
        return jnp.where(safe, jnp.maximum(self.energy, 0) / jnp.where(safe, size, jnp.ones_like(size)), 0)


def no_pivots(matrix: Float[Array, "p p"], rows: Float[Array, "n p"], steps: int) -> Pivots:
    """Room for `steps` pivots of (matrix, rows), none done yet."""
    n, p = rows.shape
    zeros = partial(jnp.zeros, dtype=matrix.dtype)
    return Pivots(
        v=zeros((steps, p)),
        e=zeros((n, steps)),
        sign=zeros(steps),
        shift=zeros(p),
        diagonal=jnp.diagonal(matrix),
        energy=jnp.sum(rows * rows, axis=0),
        num=jnp.zeros((), int),
    )


def pivot(
    matrix: Float[Array, "p p"],
    rows: Float[Array, "n p"],
    done: Pivots,
    j: Int[Array, ""],
    on: Bool[Array, ""],
    *,
    sweeps: bool,
) -> Pivots:
    """One more pivot, at j, unless `on` is false.

    Without `sweeps` row and column j are eliminated: they become zero. With it they are swept (Goodnight 1979): put
    to |pivot|^-1 times what they were and -1 / pivot on the diagonal, which a second sweep undoes.
    """
    here = (jnp.arange(matrix.shape[0]) == j).astype(matrix.dtype)
    row = matrix[j] - (done.v[:, j] * done.sign) @ done.v + done.shift[j] * here
    size = jnp.maximum(jnp.abs(row[j]), jnp.finfo(row.dtype).tiny)
    sign = jnp.where(row[j] < 0, -1.0, 1.0).astype(row.dtype)
    turn = sign if sweeps else jnp.zeros_like(sign)
    # A sweep is elimination along row - turn e_j, then 2 turn taken from the diagonal.
    scale = jnp.where(on, 1 / jnp.sqrt(size), 0)
    v = (row - turn * here) * scale
    e = (rows[:, j] - done.e @ done.v[:, j]) * scale * sign
    product = e @ rows - (e @ done.e) @ done.v
    shift = jnp.where(on, -2 * turn, 0) * here
    return Pivots(
        v=done.v.at[done.num].set(v),
        e=done.e.at[:, done.num].set(e),
        sign=done.sign.at[done.num].set(sign),
        shift=done.shift + shift,
        diagonal=done.diagonal - sign * v * v + shift,
        energy=done.energy - 2 * v * product + jnp.sum(e * e) * v * v,
        num=done.num + on.astype(int),
    )


def swept(
    gram: Float[Array, "p p"], w: Float[Array, "n p"], mask: Bool[Array, " p"]
) -> tuple[Float[Array, "p p"], Float[Array, "n p"]]:
    """gram and w gram swept on the flagged columns S (Goodnight 1979).

    Returns:
        (q, c): on S, q = -gram_SS^-1 and c the refitted coefficients; outside, q and c are what remains of gram and
        w gram with S projected out. ||c_j||^2 / |q_jj| is what F loses by adding j, or gains by removing it.
    """
    cross, eye = w @ gram, jnp.eye(w.shape[1], dtype=gram.dtype)
    column, row = mask[:, None], mask[None, :]
    factor = jax.scipy.linalg.cho_factor(jnp.where(column & row, gram, eye), lower=True)
    # On rows S: gram_SS^-1 in the columns S, gram_SS^-1 gram_S: in the others. Zero on the other rows.
    solved = jax.scipy.linalg.cho_solve(factor, jnp.where(row, eye, jnp.where(column, gram, 0)))
    rest = gram - gram @ solved
    q = jnp.where(column, jnp.where(row, -solved, solved), jnp.where(row, solved.T, rest))
    fitted = cross @ solved
    return q, jnp.where(row, fitted, cross - fitted)
