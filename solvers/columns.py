"""Which columns of a layer's matrix to keep, chosen on the Gram matrix alone.

The objective everywhere is the linear error of the best refit on the kept columns S,

    F(S) = min over m with m = 0 outside S of tr((w - m) gram (w - m)'),

which depends on `gram` (p, p) and the start matrix w (n, p) only. Group OBS removes columns one by one from the full
matrix, forward selection adds them one by one to the empty one, swaps repair what either got wrong. Column scales do
not matter: everything works on unit diagonals, with a ridge of p times the rounding unit.

Reference: Hassibi & Stork, Optimal Brain Surgeon (1993), here with a column as the unit that goes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from solvers.pivots import no_pivots, pivot, swept

_LARGE = 2048  # columns; a step passes over a p x p matrix, so beyond this whole groups go several at a time
_GROUPS_AT_ONCE = 8

MAX_SWAPS = 200
PANEL = 32  # eliminations gathered into one matrix product: speed only


def unit_diagonal(gram: Float[Array, "p p"], w: Float[Array, "n p"]) -> tuple[Float[Array, "p p"], Float[Array, "n p"]]:
    """The same problem with columns scaled to gram_jj = 1, plus a ridge of p eps that keeps factorisations finite."""
    p = gram.shape[0]
    diagonal = jnp.diagonal(gram)
    scale = jnp.sqrt(jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal)))
    ridge = p * jnp.finfo(gram.dtype).eps * jnp.eye(p, dtype=gram.dtype)
    return gram / (scale[:, None] * scale[None, :]) + ridge, w * scale[None, :]


def kept_first(mask: Bool[Array, " p"]) -> Int[Array, " p"]:
    """Order of the columns with the flagged ones first, each part by index."""
    return jnp.argsort(jnp.logical_not(mask), stable=True)


def first_of(order: Int[Array, " p"], k: Int[ArrayLike, ""]) -> Bool[Array, " p"]:
    """Mask of the first k columns of an order."""
    return jnp.argsort(order) < k


def _inverse(gram: Array) -> Array:
    return cho_solve((jnp.linalg.cholesky(gram), True), jnp.eye(gram.shape[0], dtype=gram.dtype))


def _eliminate(
    matrix: Float[Array, "p p"],
    rows: Float[Array, "n p"],
    count: Int[Array, ""],
    direction: float,
    block: int,
    locked: Bool[Array, " p"],
) -> Int[Array, " p"]:
    """Greedy elimination of `count` unlocked columns; the step at which each went, p for those that stayed.

    Each step takes the j with the least direction * ||rows_j||^2 / matrix_jj and projects it out. With
    matrix = gram^-1, rows = w, direction = 1 that is OBS; with matrix = gram, rows = w gram, direction = -1 it is
    forward selection. Pivots are multiplied out block by block.
    """
    p = matrix.shape[0]

    def pick(_: Array, s: tuple, matrix: Array, rows: Array) -> tuple:
        done, when, num = s
        score = jnp.where((when == p) & ~locked, direction * done.scores, jnp.inf)
        j = jnp.argmin(score)
        on = (num < count) & jnp.isfinite(score[j])
        when = when.at[j].set(jnp.where(on, num, when[j]))
        return pivot(matrix, rows, done, j, on, sweeps=False), when, num + 1

    def panel(s: tuple) -> tuple:
        matrix, rows, when, num = s
        inner = (no_pivots(matrix, rows, block), when, num)
        done, when, num = lax.fori_loop(0, block, partial(pick, matrix=matrix, rows=rows), inner)
        return matrix - done.v.T @ done.v, rows - done.e @ done.v, when, num

    start = (matrix, rows, jnp.full(p, p, count.dtype), jnp.zeros((), count.dtype))
    return lax.while_loop(lambda s: s[3] < count, panel, start)[2]


def obs_steps(
    gram: Float[Array, "p p"],
    w: Float[Array, "n p"],
    remove: Int[Array, ""],
    locked: Bool[Array, " p"],
    block: int = PANEL,
) -> Int[Array, " p"]:
    """Step at which group OBS removes each column when it removes `remove` of those not `locked`; p for what stays.

    `gram` is that of `unit_diagonal`, whose ridge bounds the rounding in the inverse.
    """
    inverse = _inverse(gram)
    return _eliminate(inverse, w, remove, 1.0, block, locked)


@partial(jax.jit, static_argnames="block")
def obs_order(gram: Float[Array, "p p"], w: Float[Array, "n p"], *, block: int = PANEL) -> Int[Array, " p"]:
    """Columns in the order in which group OBS would rather keep them: the first k are its choice of k columns.

    One pass orders all p columns and so serves every budget: each step removes argmin ||a_j||^2 / K_jj, the column
    whose loss costs least after the others are refitted (K = gram^-1, a = the refitted matrix).

    Args:
        gram: (p, p), positive semi-definite.
        w: (n, p), the matrix to approximate.
        block: eliminations gathered into one matrix product; changes the speed, not the order.

    Returns:
        A permutation of the columns, (p,).
    """
    gram, w = unit_diagonal(gram, w)
    steps = obs_steps(gram, w, jnp.asarray(w.shape[1]), jnp.zeros(w.shape[1], bool), block)
    return jnp.argsort(-steps, stable=True)


@partial(jax.jit, static_argnames="block")
def forward_order(gram: Float[Array, "p p"], w: Float[Array, "n p"], *, block: int = PANEL) -> Int[Array, " p"]:
    """Columns in the order in which greedy forward selection adds them: argmax of the fall of F, one at a time.

    Arguments and result as in `obs_order`.
    """
    gram, w = unit_diagonal(gram, w)
    count, locked = jnp.asarray(w.shape[1]), jnp.zeros(w.shape[1], bool)
    return jnp.argsort(_eliminate(gram, w @ gram, count, -1.0, block, locked), stable=True)


@jax.jit
def error_curve(gram: Float[Array, "p p"], w: Float[Array, "n p"], order: Int[Array, " p"]) -> Float[Array, " p+1"]:
    """F of the first k columns of an order for every k = 0..p, from one Cholesky factor of gram.

    With gram = l l' in that order and z = w l, F(k) is the energy of the columns of z from k on.
    """
    gram, w = unit_diagonal(gram, w)
    z = w[:, order] @ jnp.linalg.cholesky(gram[order][:, order])
    tails = jnp.cumsum(jnp.sum(z * z, axis=0)[::-1])[::-1]
    return jnp.concatenate([tails, jnp.zeros(1, gram.dtype)])


def column_error(gram: Float[Array, "p p"], w: Float[Array, "n p"], mask: Bool[Array, " p"]) -> Float[Array, ""]:
    """F of the flagged columns."""
    return error_curve(gram, w, kept_first(mask))[jnp.sum(mask)]


def _swap(gram: Array, w: Array, mask: Array, max_swaps: Array) -> Array:
    block = max(PANEL, w.shape[1] // 24)  # a new start costs p^3
    slack = 1 + 100 * float(jnp.finfo(gram.dtype).eps)

    def once(s: tuple, q: Array, c: Array) -> tuple:
        done, mask, num, _ = s
        gain = jnp.where(mask, -1, done.scores)
        new = jnp.argmax(gain)
        done = pivot(q, c, done, new, jnp.asarray(True), sweeps=True)
        grown = mask.at[new].set(True)
        loss = jnp.where(grown, done.scores, jnp.inf)
        old = jnp.argmin(loss)
        better = loss[old] * slack < gain[new]
        done = pivot(q, c, done, old, better, sweeps=True)
        return done, jnp.where(better, grown.at[old].set(False), mask), num + 1, better

    def panel(s: tuple) -> tuple:
        mask, num, going = s
        q, c = swept(gram, w, mask)
        more = lambda s: s[3] & (s[2] < max_swaps) & (s[0].num < 2 * block)  # noqa: E731
        start = (no_pivots(q, c, 2 * block), mask, num, going)
        return lax.while_loop(more, partial(once, q=q, c=c), start)[1:]

    going = jnp.any(mask) & ~jnp.all(mask)
    start = (mask, jnp.zeros((), int), going)
    return lax.while_loop(lambda s: s[2] & (s[1] < max_swaps), panel, start)[0]


@jax.jit
def swap(
    gram: Float[Array, "p p"],
    w: Float[Array, "n p"],
    mask: Bool[Array, " p"],
    max_swaps: Int[ArrayLike, ""] = MAX_SWAPS,
) -> Bool[Array, " p"]:
    """Add the best column, remove the worst, while F falls; the number of kept columns stays.

    Args:
        gram: (p, p), positive semi-definite.
        w: (n, p), the matrix to approximate.
        mask: kept columns, (p,).
        max_swaps: upper limit, traced.

    Returns:
        The mask with at most `max_swaps` columns exchanged; F is never above that of `mask`.
    """
    return _swap(*unit_diagonal(gram, w), mask, jnp.asarray(max_swaps).astype(int))


@partial(jax.jit, static_argnames="block")
def select(
    gram: Float[Array, "p p"],
    w: Float[Array, "n p"],
    k: Int[ArrayLike, ""],
    *,
    max_swaps: Int[ArrayLike, ""] = MAX_SWAPS,
    block: int = PANEL,
) -> Bool[Array, " p"]:
    """k columns with a low F: the better of OBS + swaps and forward selection + swaps.

    OBS tends to win when half of the columns stay, forward selection when few do.

    Args:
        gram: (p, p), positive semi-definite.
        w: (n, p), the matrix to approximate.
        k: how many columns to keep, traced; beyond [0, p] it counts as the nearer end.
        max_swaps: swaps for each of the two starts, traced.
        block: as in `obs_order`.

    Returns:
        Mask of the kept columns, (p,).
    """
    p = gram.shape[0]
    scaled, wide = unit_diagonal(gram, w)
    k = jnp.clip(jnp.asarray(k).astype(int), 0, p)
    nothing = jnp.zeros(p, bool)
    obs = obs_steps(scaled, wide, p - k, nothing, block) == p
    forward = _eliminate(scaled, wide @ scaled, k, -1.0, block, nothing) < p

    def finish(mask: Array) -> tuple[Array, Array]:
        mask = _swap(scaled, wide, mask, jnp.asarray(max_swaps).astype(int))
        return mask, column_error(gram, w, mask)

    masks, errors = lax.map(finish, jnp.stack([obs, forward]))
    return masks[jnp.argmin(errors)]


def removal_costs(
    gram: Float[Array, "p p"], w: Float[Array, "n p"], mask: Bool[np.ndarray, " p"]
) -> Float[np.ndarray, " p"]:
    """How much F rises when a kept column goes alone and the others are refitted; 0 for columns that are not kept.

    ||a_j||^2 / K_jj with a = w gram_:S K and K = gram_SS^-1, in float64 on the host: for a few removals, not for paths.

    Args:
        gram: (p, p), positive definite on the kept columns.
        w: (n, p), the matrix to approximate.
        mask: kept columns S, (p,).
    """
    moments, matrix, costs = np.asarray(gram, np.float64), np.asarray(w, np.float64), np.zeros(len(mask))
    inverse = np.linalg.inv(moments[np.ix_(mask, mask)])
    refitted = matrix @ moments[:, mask] @ inverse
    costs[mask] = np.sum(refitted**2, axis=0) / np.diagonal(inverse)
    return costs


def _members(group: np.ndarray, p: int) -> np.ndarray:
    """Columns of each group, (groups, size)."""
    group = np.asarray(group)
    sizes = np.unique(group, return_counts=True)[1]
    if group.shape != (p,) or len(np.unique(sizes)) != 1:
        raise ValueError(
            f"group must name the group of each of the {p} columns, all groups of one size; it has the shape "
            f"{group.shape} and sizes {sorted(set(sizes.tolist()))}. Channels of a kernel: arange(p) % c_in."
        )
    return np.argsort(group, kind="stable").reshape(len(sizes), sizes[0])


@jax.jit
def _group_steps(gram: Array, w: Array, members: Array, remove: Array) -> Array:
    """Step at which each group goes by group OBS on whole groups; the number of groups for those that stay."""
    groups, size = members.shape
    gram, w = unit_diagonal(gram, w)
    eye = jnp.eye(size, dtype=gram.dtype)

    def body(s: tuple, at_once: int) -> tuple:
        inverse, rows, when, num = s
        here = when == groups
        blocks = jnp.where(here[:, None, None], inverse[members[:, :, None], members[:, None, :]], eye[None])
        half = solve_triangular(jnp.linalg.cholesky(blocks), rows.T[members], lower=True)
        gone = lax.top_k(jnp.where(here, -jnp.sum(half * half, axis=(1, 2)), -jnp.inf), at_once)[1]
        columns = members[gone].reshape(-1)
        strip = cho_solve((jnp.linalg.cholesky(inverse[columns[:, None], columns[None, :]]), True), inverse[columns])
        rows, inverse = rows - rows[:, columns] @ strip, inverse - inverse[:, columns] @ strip
        return inverse, rows, when.at[gone].set(num + jnp.arange(at_once, dtype=num.dtype)), num + at_once

    state = (_inverse(gram), w, jnp.full(groups, groups, remove.dtype), jnp.zeros((), remove.dtype))
    for at_once in sorted({_GROUPS_AT_ONCE if w.shape[1] > _LARGE else 1, 1}, reverse=True):
        state = lax.while_loop(lambda s, k=at_once: s[3] + k <= remove, partial(body, at_once=at_once), state)
    return state[2]


def group_order(gram: Float[Array, "p p"], w: Float[Array, "n p"], group: Int[np.ndarray, " p"]) -> Int[Array, " p"]:
    """`obs_order` with groups of columns as the units: block OBS, argmin tr(a_g K_gg^-1 a_g').

    Args:
        gram: (p, p), positive semi-definite.
        w: (n, p), the matrix to approximate.
        group: the group of each column, (p,), NumPy; equal sizes. `arange(p) % c_in` makes input channels the groups.

    Returns:
        A permutation of the columns, members of a group side by side.

    Raises:
        ValueError: groups of different sizes, or not one group per column.
    """
    members = _members(group, w.shape[1])
    steps = _group_steps(gram, w, jnp.asarray(members), jnp.asarray(len(members)))
    return jnp.asarray(members)[jnp.argsort(-steps, stable=True)].reshape(-1)


def select_groups(
    gram: Float[Array, "p p"], w: Float[Array, "n p"], k: Int[ArrayLike, ""], group: Int[np.ndarray, " p"]
) -> Bool[Array, " p"]:
    """Mask of the k groups of columns that block OBS keeps; arguments and errors as in `group_order`.

    k is traced; beyond the number of groups it counts as the nearer end.
    """
    members = _members(group, w.shape[1])
    remove = jnp.clip(len(members) - jnp.asarray(k).astype(int), 0, len(members))
    kept = _group_steps(gram, w, jnp.asarray(members), remove) == len(members)
    return jnp.zeros(w.shape[1], bool).at[jnp.asarray(members)].set(kept[:, None])
