"""Which columns of a layer's matrix to keep, chosen on the Gram matrix alone.

The objective everywhere is the linear error of the best refit on the kept columns S,

    F(S) = min over m with m = 0 outside S of tr((w - m) gram (w - m)'),

which depends on `gram` (p, p) and the start matrix w (n, p) only. Group OBS removes columns one by one from the full
matrix, forward selection adds them one by one to the empty one, swaps repair what either got wrong. Column scales do
not matter: everything works on unit diagonals, with a ridge of p times the rounding unit.

References: Hassibi & Stork, Optimal Brain Surgeon (1993), with a column as the unit that goes; Goodnight, A Tutorial on
the SWEEP Operator (1979); Lucas, LAPACK working note 161 (2004) for the delayed updates.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

MAX_SWAPS = 200
PANEL = 32  # eliminations gathered into one matrix product: speed only


def unit_diagonal(
    gram: Float[Array, "p p"], w: Float[Array, "n p"]
) -> tuple[Float[Array, "p p"], Float[Array, "n p"]]:
    """The same problem with columns scaled to gram_jj = 1, plus a ridge of p eps that keeps factorisations finite."""
    p = gram.shape[0]
    diagonal = jnp.diagonal(gram)
    scale = jnp.sqrt(jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal)))
    ridge = p * jnp.finfo(gram.dtype).eps * jnp.eye(p, dtype=gram.dtype)
    return gram / (scale[:, None] * scale[None, :]) + ridge, w * scale[None, :]


def kept_first(mask: Bool[Array, " p"]) -> Int[Array, " p"]:
    """Order of the columns with the flagged ones first, each part by index."""
    return jnp.argsort(jnp.logical_not(mask), stable=True)


def first_of(order: Int[Array, " p"], k: Int[Array, ""] | int) -> Bool[Array, " p"]:
    """Mask of the first k columns of an order."""
    return jnp.argsort(order) < k


def _score(energy: Array, variance: Array) -> Array:
    """energy / variance; zero where elimination has left nothing but rounding."""
    safe = variance > jnp.finfo(variance.dtype).tiny
    return jnp.where(safe, energy / jnp.where(safe, variance, jnp.ones_like(variance)), jnp.zeros_like(energy))


def _masked_inverse(gram: Array, mask: Array) -> Array:
    """Inverse of gram restricted to the flagged columns, zero elsewhere."""
    both = mask[:, None] & mask[None, :]
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    factor = jax.scipy.linalg.cho_factor(jnp.where(both, gram, eye), lower=True)
    return jnp.where(both, jax.scipy.linalg.cho_solve(factor, eye), jnp.zeros_like(eye))


def _eliminate(
    matrix: Float[Array, "p p"],
    rows: Float[Array, "n p"],
    count: Int[Array, ""],
    sign: float,
    block: int,
    locked: Bool[Array, " p"] | None = None,
) -> Int[Array, " p"]:
    """Greedy symmetric elimination; returns the step at which each column went, p for those that stayed.

    Each step takes the j with the least sign * ||rows_j||^2 / matrix_jj and projects it out,
    rows <- rows - rows_j matrix_j / matrix_jj, matrix <- matrix - matrix_j' matrix_j / matrix_jj. With
    matrix = gram^-1, rows = w, sign = 1 that is OBS; with matrix = gram, rows = w gram, sign = -1 forward selection.
    Updates are delayed: inside a block only the pivot's row, the diagonal and the energies are brought up to date.
    """
    n, p = rows.shape
    zero = jnp.zeros((), matrix.dtype)
    first = jnp.full(p, p) if locked is None else jnp.where(locked, p + 1, p)

    def pick(i: Array, inner: tuple, matrix: Array, rows: Array, start: Array) -> tuple:
        v, e, diagonal, energy, when = inner
        score = jnp.where(when == p, sign * _score(energy, diagonal), jnp.inf)
        j = jnp.argmin(score)
        on = (start + i < count) & jnp.isfinite(score[j])
        pivot = jnp.where(on, matrix[j] - v[:, j] @ v, zero)
        root = jnp.sqrt(jnp.maximum(pivot[j], jnp.finfo(pivot.dtype).tiny))
        pivot, column = pivot / root, jnp.where(on, rows[:, j] - e @ v[:, j], zero) / root
        inner_product = column @ rows - (column @ e) @ v
        energy = energy - 2 * pivot * inner_product + jnp.sum(column * column) * pivot * pivot
        when = when.at[j].set(jnp.where(on, start + i, when[j]))
        return v.at[i].set(pivot), e.at[:, i].set(column), diagonal - pivot * pivot, energy, when

    def panel(state: tuple) -> tuple:
        matrix, rows, when, start = state
        inner = (
            jnp.zeros((block, p), matrix.dtype),
            jnp.zeros((n, block), matrix.dtype),
            jnp.diagonal(matrix),
            jnp.sum(rows * rows, axis=0),
            when,
        )
        v, e, _, _, when = lax.fori_loop(0, block, partial(pick, matrix=matrix, rows=rows, start=start), inner)
        return matrix - v.T @ v, rows - e @ v, when, start + block

    start = (matrix, rows, first, jnp.zeros((), count.dtype))
    return jnp.minimum(lax.while_loop(lambda s: s[3] < count, panel, start)[2], p)


def _obs_steps(
    gram: Array, w: Array, remove: Array, block: int, locked: Array | None = None, refresh: bool = True
) -> Array:
    """Step at which OBS removes each column, p for those that stay; `gram` has a unit diagonal.

    The first half of the columns goes with one inverse, the rest with a fresh one for each further halving: rounding
    that the small eigenvalues of gram bring into the inverse goes with the columns that caused it.
    """
    p = gram.shape[0]
    cross = w @ gram
    stages = 4 if refresh and p > 4 * block else 1
    bounds = jnp.asarray([p - (p >> s) for s in range(1, stages)] + [p])

    def stage(when: Array, bound: Array) -> tuple[Array, None]:
        done = jnp.sum(when < p)
        inverse = _masked_inverse(gram, when == p)
        gone = when < p
        fixed = gone if locked is None else gone | locked
        count = jnp.maximum(jnp.minimum(bound, remove) - done, 0)
        more = _eliminate(inverse, jnp.where(gone[None, :], 0.0, cross) @ inverse, count, 1.0, block, fixed)
        return jnp.where(more < p, more + done, when), None

    return lax.scan(stage, jnp.full(p, p), bounds)[0]


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
    steps = _obs_steps(gram, w, jnp.asarray(gram.shape[0]), block)
    return jnp.argsort(-steps, stable=True)


@partial(jax.jit, static_argnames="block")
def forward_order(gram: Float[Array, "p p"], w: Float[Array, "n p"], *, block: int = PANEL) -> Int[Array, " p"]:
    """Columns in the order in which greedy forward selection adds them: argmax of the fall of F, one at a time.

    Arguments and result as in `obs_order`.
    """
    gram, w = unit_diagonal(gram, w)
    return jnp.argsort(_eliminate(gram, w @ gram, jnp.asarray(gram.shape[0]), -1.0, block), stable=True)


@jax.jit
def error_curve(
    gram: Float[Array, "p p"], w: Float[Array, "n p"], order: Int[Array, " p"]
) -> Float[Array, " p+1"]:
    """F of the first k columns of an order for every k = 0..p, from one Cholesky factor of gram.

    With gram = l l' in that order and z = w l, F(k) is the energy of the columns of z from k on.
    """
    gram, w = unit_diagonal(gram, w)
    z = w[:, order] @ jnp.linalg.cholesky(gram[order][:, order])
    tails = jnp.cumsum(jnp.sum(z * z, axis=0)[::-1])[::-1]
    return jnp.concatenate([tails, jnp.zeros(1, gram.dtype)])


def column_error(
    gram: Float[Array, "p p"], w: Float[Array, "n p"], mask: Bool[Array, " p"]
) -> Float[Array, ""]:
    """F of the flagged columns."""
    return error_curve(gram, w, kept_first(mask))[jnp.sum(mask)]


def swept(
    gram: Float[Array, "p p"], w: Float[Array, "n p"], mask: Bool[Array, " p"]
) -> tuple[Float[Array, "p p"], Float[Array, "n p"]]:
    """gram and w gram swept on the flagged columns S (Goodnight 1979).

    Returns:
        (q, c): on S, q = -gram_SS^-1 and c the refitted coefficients; outside, q and c are what remains of gram and
        w gram with S projected out. ||c_j||^2 / |q_jj| is what F loses by adding j, or gains by removing it.
    """
    cross = w @ gram
    inverse = _masked_inverse(gram, mask)
    half = inverse @ gram
    rest = gram - gram @ half
    q = jnp.where(mask[:, None], jnp.where(mask[None, :], -inverse, half), jnp.where(mask[None, :], half.T, rest))
    return q, jnp.where(mask[None, :], cross @ inverse, cross - cross @ half)


def sweep(
    q: Float[Array, "p p"], c: Float[Array, "n p"], j: Int[Array, ""]
) -> tuple[Float[Array, "p p"], Float[Array, "n p"]]:
    """`swept` after column j goes in if it was out, out if it was in."""
    pivot = q[j, j]
    row, column = q[j], c[:, j]
    here = jnp.arange(q.shape[0]) == j
    edge = jnp.where(here, -1 / pivot, row / jnp.abs(pivot))
    inner = q - row[:, None] * (row / pivot)[None, :]
    q = jnp.where(here[:, None], edge[None, :], jnp.where(here[None, :], edge[:, None], inner))
    rest = c - column[:, None] * (row / pivot)[None, :]
    return q, jnp.where(here[None, :], (column / jnp.abs(pivot))[:, None], rest)


def sweep_scores(q: Float[Array, "p p"], c: Float[Array, "n p"]) -> Float[Array, " p"]:
    """By how much F changes when a column changes sides, (p,)."""
    return _score(jnp.sum(c * c, axis=0), jnp.abs(jnp.diagonal(q)))


def _swap(gram: Array, w: Array, mask: Array, max_swaps: Array | int) -> Array:
    slack = 1 + 100 * float(jnp.finfo(gram.dtype).eps)

    def body(state: tuple) -> tuple:
        q, c, mask, num, _ = state
        gain = jnp.where(mask, -1.0, sweep_scores(q, c))
        new = jnp.argmax(gain)
        q, c = sweep(q, c, new)
        grown = mask.at[new].set(True)
        loss = jnp.where(grown, sweep_scores(q, c), jnp.inf)
        old = jnp.argmin(loss)
        better = loss[old] * slack < gain[new]
        q, c = lax.cond(better, sweep, lambda q, c, j: (q, c), q, c, old)
        return q, c, jnp.where(better, grown.at[old].set(False), mask), num + 1, better

    going = (max_swaps > 0) & jnp.any(mask) & jnp.logical_not(jnp.all(mask))
    start = (*swept(gram, w, mask), mask, jnp.zeros((), jnp.int32), going)
    return lax.while_loop(lambda s: s[4] & (s[3] < max_swaps), body, start)[2]


@jax.jit
def swap(
    gram: Float[Array, "p p"],
    w: Float[Array, "n p"],
    mask: Bool[Array, " p"],
    max_swaps: Int[Array, ""] | int = MAX_SWAPS,
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
    return _swap(*unit_diagonal(gram, w), mask, max_swaps)


@partial(jax.jit, static_argnames="block")
def select(
    gram: Float[Array, "p p"],
    w: Float[Array, "n p"],
    k: Int[Array, ""] | int,
    *,
    max_swaps: Int[Array, ""] | int = MAX_SWAPS,
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
    k = jnp.clip(jnp.asarray(k), 0, p)
    obs = _obs_steps(scaled, wide, p - k, block) == p
    forward = _eliminate(scaled, wide @ scaled, k, -1.0, block) < p
    starts = jnp.stack([obs, forward])
    masks = lax.map(lambda mask: _swap(scaled, wide, mask, max_swaps), starts)
    errors = lax.map(lambda mask: column_error(gram, w, mask), masks)
    return masks[jnp.argmin(errors)]
