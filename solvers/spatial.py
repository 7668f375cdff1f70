"""Spatial low rank + columns for (kh, kw) convolutions, chosen on the Gram matrix.

The first factor b (r, kw * c_in) turns the input into kh * r features, phi[i, s] = sum_q b[s, q] x[i, q], one set per
kernel row i; k single columns are added as they are. The second factor and the columns' values follow by least
squares, so the only unknowns are b and which columns. Eliminating the rest leaves

    F(b, S) = min over M in span(features, columns S) of E ||T - x M'||^2.

b and S are found by turns: b by L-BFGS on F with S projected out of the moments, S by forward greedy with the features
projected out (backward elimination cannot start: with the features removed the Gram matrix is singular).
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Bool, Float, Int

from solvers.gram import GramStatistics


@dataclass(frozen=True, kw_only=True)
class SpatialOptions:
    """Static options: they shape the compiled program. The defaults suit p up to about 1500.

    Attributes:
        max_rank: size of the padded first factor; ranks above it are cut. None: the rank at which the plain pair
            of convolutions is as large as the dense kernel.
        max_columns: most single columns ever chosen. None: p.
        rounds: times that columns are chosen and the first factor is solved again.
        max_steps: L-BFGS steps per solve of the first factor.
        memory: pairs that L-BFGS remembers.
        rtol: L-BFGS stops when a step lowers the error by less than this fraction of it.
        block: columns chosen at a time; 1 is the plain greedy rule.
    """

    max_rank: int | None = None
    max_columns: int | None = None
    rounds: int = 3
    max_steps: int = 30
    memory: int = 8
    rtol: float = 1e-4
    block: int = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SpatialColumns:
    """What the form keeps. The second factor and the columns' values are left to the refit.

    Attributes:
        first: (r_max, kw * c_in), rows from `rank` on are zero; the others are uncorrelated features of unit mean
            energy over the kernel rows.
        rank: r, at most r_max.
        columns: (p,), the single columns.
        error: relative squared linear error after the least-squares fit, 0 is perfect.
    """

    first: Float[Array, "r_max q"]
    rank: Int[Array, ""]
    columns: Bool[Array, " p"]
    error: Float[Array, ""]


class _Moments(NamedTuple):
    gram: Float[Array, "p p"]
    cross: Float[Array, "n p"]


def rank_bound(n: int, p: int, window: tuple[int, ...]) -> int:
    """The rank at which a plain pair of factors stores as much as the dense kernel: n p / (kw c_in + kh n)."""
    q = p // window[0]
    return max(1, min(n * p // (q + window[0] * n), q, window[0] * n))


def pair_cost(rank: Int[Array, "*ranks"], n: int, q: int, rows: int, *, gauge: bool) -> Int[Array, "*ranks"]:
    """Stored values of the two factors of rank r: r q + r kh n, less r^2 in gauge form (identity block of the first)."""
    cost = rank * (q + rows * n)
    return cost - rank * rank if gauge else cost


def rank_grid(
    n: int,
    p: int,
    window: tuple[int, ...],
    budget: Int[Array, ""] | int,
    *,
    gauge: bool = True,
    fractions: tuple[float, ...] = (0.25, 0.5, 0.7, 0.85, 1.0),
    max_rank: int | None = None,
) -> Int[Array, " ranks"]:
    """Ranks to try: fractions of the largest rank whose factors alone fit the budget (at most `max_rank`)."""
    q, bound = p // window[0], max_rank or rank_bound(n, p, window)
    largest = _largest_rank(budget, n, q, window[0], bound, gauge)
    return jnp.stack([(largest * round(1000 * f) + 500) // 1000 for f in fractions])


def _largest_rank(budget: Int[Array, ""] | int, n: int, q: int, rows: int, bound: int, gauge: bool) -> Int[Array, ""]:
    costs = pair_cost(jnp.arange(bound + 1), n, q, rows, gauge=gauge)  # increasing: bound <= min(q, rows n)
    return jnp.sum(costs <= budget).astype(jnp.int32) - 1


def _unit(mask: Bool[Array, " r"], dtype: jnp.dtype) -> Float[Array, "r r"]:
    """Identity on the rows that are not used, so that their zero rows leave a Cholesky factor alone."""
    return jnp.diag(jnp.logical_not(mask).astype(dtype))


def _second(
    first: Float[Array, "r q"], moments: _Moments, used: Bool[Array, " r"], ridge: Float[Array, ""]
) -> tuple[Float[Array, "n kr"], Float[Array, "n kr"], Float[Array, "kr p"]]:
    """Second factor by ridge least squares, cross T', and T gram, for the features T = I_kh (x) first."""
    (r, q), p, n = first.shape, moments.gram.shape[0], moments.cross.shape[0]
    rows = p // q
    filtered = jnp.einsum("sq,iqp->isp", first, moments.gram.reshape(rows, q, p)).reshape(rows * r, p)
    inner = jnp.einsum("ajq,tq->ajt", filtered.reshape(rows * r, rows, q), first).reshape(rows * r, rows * r)
    aim = jnp.einsum("ojq,tq->ojt", moments.cross.reshape(n, rows, q), first).reshape(n, rows * r)
    inner = inner + jnp.diag(jnp.tile(jnp.where(used, ridge, jnp.ones_like(ridge)), rows))
    chol = jnp.linalg.cholesky(inner)
    return cho_solve((chol, True), aim.T).T, aim, filtered


def eliminated_objective(
    first: Float[Array, "r q"], moments: _Moments, used: Bool[Array, " r"], ridge: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, "r q"]]:
    """min over the second factor s of E||T - x (s T)'||^2 + ridge ||s||^2, less E||T||^2; and its gradient.

    By the envelope theorem the gradient is that with s held fixed: the sum over kernel rows i of -2 s_i' (C - M G)_i.
    """
    r, q = first.shape
    second, aim, filtered = _second(first, moments, used, ridge)
    n, rows = second.shape[0], second.shape[1] // r
    residual = (moments.cross - second @ filtered).reshape(n, rows, q)
    gradient = -2 * jnp.einsum("nis,niq->sq", second.reshape(n, rows, r), residual)
    return -jnp.sum(second * aim), gradient


class _Search(NamedTuple):
    first: Float[Array, "r q"]
    value: Float[Array, ""]
    gradient: Float[Array, "r q"]
    direction: Float[Array, "r q"]
    length: Float[Array, ""]
    moves: Float[Array, "memory r q"]
    turns: Float[Array, "memory r q"]
    pairs: Int[Array, ""]
    steps: Int[Array, ""]
    done: Bool[Array, ""]


def _descent_direction(s: _Search) -> Float[Array, "r q"]:
    """L-BFGS two-loop recursion (Nocedal & Wright 2006, algorithm 7.4); unused pairs are zero and drop out."""
    memory = s.moves.shape[0]
    curvature = jnp.sum(s.moves * s.turns, axis=(1, 2))
    rho = jnp.where(curvature > 0, 1 / jnp.where(curvature > 0, curvature, 1), 0)

    def backward(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        v, alphas = state
        j = (s.pairs - 1 - i) % memory
        alpha = rho[j] * jnp.sum(s.moves[j] * v)
        return v - alpha * s.turns[j], alphas.at[j].set(alpha)

    def forward(i: Array, v: Array) -> Array:
        j = (s.pairs + i) % memory
        return v + (alphas[j] - rho[j] * jnp.sum(s.turns[j] * v)) * s.moves[j]

    v, alphas = lax.fori_loop(0, memory, backward, (s.gradient, jnp.zeros_like(rho)))
    last = (s.pairs - 1) % memory
    energy = jnp.sum(s.turns[last] ** 2)
    # without pairs: the preconditioned Hessian is about 2 I, see _fit_first
    scale = jnp.where(energy > 0, curvature[last] / jnp.where(energy > 0, energy, 1), jnp.asarray(0.5, v.dtype))
    return -lax.fori_loop(0, memory, forward, scale * v)


def _minimise(
    first: Float[Array, "r q"],
    moments: _Moments,
    used: Bool[Array, " r"],
    ridge: Float[Array, ""],
    energy: Float[Array, ""],
    options: SpatialOptions,
) -> Float[Array, "r q"]:
    """L-BFGS with backtracking; one loop, in which a step is either taken or shortened, keeps the program small."""
    evaluate = partial(eliminated_objective, moments=moments, used=used, ridge=ridge)

    def step(s: _Search) -> _Search:
        trial = s.first + s.length * s.direction
        value, gradient = evaluate(trial)
        slope = jnp.sum(s.gradient * s.direction)
        taken = value <= s.value + jnp.asarray(1e-4, slope.dtype) * s.length * slope
        move, turn, at = trial - s.first, gradient - s.gradient, s.pairs % options.memory
        keep = taken & (jnp.sum(move * turn) > 0)
        small = s.value - value <= options.rtol * jnp.maximum(energy + value, 0)
        t = _Search(
            first=jnp.where(taken, trial, s.first),
            value=jnp.where(taken, value, s.value),
            gradient=jnp.where(taken, gradient, s.gradient),
            direction=s.direction,
            length=jnp.where(taken, jnp.ones_like(s.length), s.length * jnp.asarray(0.3, s.length.dtype)),
            moves=s.moves.at[at].set(jnp.where(keep, move, s.moves[at])),
            turns=s.turns.at[at].set(jnp.where(keep, turn, s.turns[at])),
            pairs=s.pairs + keep.astype(jnp.int32),
            steps=s.steps + 1,
            done=(taken & small) | (s.length < 1e-3),
        )
        return t._replace(direction=jnp.where(taken, _descent_direction(t), t.direction))

    history = jnp.zeros((options.memory, *first.shape), first.dtype)
    zero = jnp.zeros((), jnp.int32)
    start = _Search(  # the first step has no length: it only evaluates
        first=first,
        value=jnp.full((), jnp.inf, first.dtype),
        gradient=jnp.zeros_like(first),
        direction=jnp.zeros_like(first),
        length=jnp.ones((), first.dtype),
        moves=history,
        turns=history,
        pairs=zero,
        steps=zero,
        done=jnp.zeros((), bool),
    )
    end = lax.while_loop(lambda s: (s.steps <= options.max_steps) & jnp.logical_not(s.done), step, start)
    return end.first, end.value


def _mean_block(gram: Float[Array, "p p"], q: int) -> Float[Array, "q q"]:
    """Mean of the diagonal q x q blocks: the Gram matrix of one kernel row; a little ridge keeps it definite."""
    rows = gram.shape[0] // q
    block = jnp.einsum("iqit->qt", gram.reshape(rows, q, rows, q)) / rows
    level = jnp.trace(block) / q
    ridge = jnp.sqrt(jnp.finfo(gram.dtype).eps) * jnp.asarray(0.01, gram.dtype) * level
    return block + jnp.where(level > 0, ridge, jnp.ones_like(level)) * jnp.eye(q, dtype=gram.dtype)


def _whitened(moments: _Moments, chol: Float[Array, "q q"]) -> _Moments:
    """Moments of the inputs L^-1 x_i, kernel row by kernel row, with L L' = chol chol'."""
    q, p, n = chol.shape[0], moments.gram.shape[0], moments.cross.shape[0]
    rows = p // q

    def one_side(m: Float[Array, "any p"]) -> Float[Array, "any p"]:
        inverse = solve_triangular(chol, jnp.eye(q, dtype=chol.dtype), lower=True)
        return jnp.einsum("ajq,tq->ajt", m.reshape(-1, rows, q), inverse).reshape(m.shape)

    return _Moments(gram=one_side(one_side(moments.gram).T), cross=one_side(moments.cross).reshape(n, p))


def _weighted_svd(
    w: Float[Array, "n p"], gram: Float[Array, "p p"], q: int, max_rank: int
) -> Float[Array, "max_rank q"]:
    """Top right singular vectors of the (kh n, q) unfolding of w, weighted by gram ~ A (x) B (rows x one row)."""
    n, p = w.shape
    rows = p // q
    chol = jnp.linalg.cholesky(_mean_block(gram, q))
    white = _whitened(_Moments(gram, w), chol).gram.reshape(rows, q, rows, q)
    between = jnp.einsum("iaja->ij", white) / q
    values, vectors = jnp.linalg.eigh(between)
    half = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
    unfolded = jnp.einsum("ij,niq->njq", half, w.reshape(n, rows, q)).reshape(n * rows, q) @ chol
    right = jnp.linalg.eigh(unfolded.T @ unfolded)[1][:, ::-1][:, :max_rank]
    return solve_triangular(chol, right, lower=True, trans="T").T


def _fit_first(
    first: Float[Array, "r q"],
    moments: _Moments,
    used: Bool[Array, " r"],
    energy: Float[Array, ""],
    options: SpatialOptions,
) -> Float[Array, "r q"]:
    """argmin over b of the eliminated objective, from `first`, in coordinates where its Hessian is nearly 2 I.

    Inputs are whitened by the mean Gram block, and b is multiplied by R with R'R = sum_i s_i' s_i, which makes the
    second factor orthonormal: 10-20 steps then do what takes hundreds in the plain coordinates.
    """
    dtype, r = first.dtype, first.shape[0]
    chol = jnp.linalg.cholesky(_mean_block(moments.gram, first.shape[1]))
    white = _whitened(moments, chol)
    b = first @ chol
    b = _orthonormal(b, b @ b.T, used)
    ridge = jnp.asarray(10 * jnp.finfo(dtype).eps, dtype)
    second = _second(b, white, used, ridge)[0].reshape(-1, r)
    inner = second.T @ second
    level = jnp.trace(inner) / jnp.maximum(jnp.sum(used), 1) * jnp.asarray(1e-6, dtype)
    inner = inner + jnp.diag(jnp.where(used, jnp.where(level > 0, level, 1), 1).astype(dtype))
    b = jnp.linalg.cholesky(inner).T @ b
    b, value = _minimise(b, white, used, ridge * jnp.trace(inner) / r, energy, options)
    return solve_triangular(chol, b.T, lower=True, trans="T").T, value


def _orthonormal(
    first: Float[Array, "r q"], inner: Float[Array, "r r"], used: Bool[Array, " r"]
) -> Float[Array, "r q"]:
    """Rows recombined so that `inner`, their Gram matrix, becomes the identity."""
    dtype = first.dtype
    jitter = jnp.where(used, 4 * jnp.finfo(dtype).eps * jnp.trace(inner), 1).astype(dtype)
    return solve_triangular(jnp.linalg.cholesky(inner + jnp.diag(jitter)), first, lower=True)


class _Projected(NamedTuple):
    moments: _Moments
    explained: Float[Array, ""]


def _project_columns_out(moments: _Moments, columns: Bool[Array, " p"], max_columns: int) -> _Projected:
    """Moments of what the single columns leave over, and the energy that they explain."""
    gram, cross = moments
    dtype = gram.dtype
    order = jnp.argsort(jnp.logical_not(columns), stable=True)[:max_columns]
    kept = columns[order].astype(dtype)
    rows = gram[order] * kept[:, None]
    inner = rows[:, order] * kept[None, :] + jnp.diag(1 - kept)
    chol = jnp.linalg.cholesky(inner)
    white = solve_triangular(chol, rows, lower=True)
    z = solve_triangular(chol, (cross[:, order] * kept[None, :]).T, lower=True)
    outside = jnp.logical_not(columns).astype(dtype)
    gram = (gram - white.T @ white) * outside[:, None] * outside[None, :]
    return _Projected(_Moments(gram, (cross - z.T @ white) * outside[None, :]), jnp.sum(z * z))


class _Greedy(NamedTuple):
    basis: Float[Array, "size p"]
    left: Float[Array, "n p"]
    diagonal: Float[Array, " p"]
    columns: Bool[Array, " p"]
    count: Int[Array, ""]


def _greedy_columns(
    first: Float[Array, "r q"],
    moments: _Moments,
    used: Bool[Array, " r"],
    count: Int[Array, ""],
    options: SpatialOptions,
    max_columns: int,
) -> Bool[Array, " p"]:
    """Forward greedy: add the column that lowers the error most, given the features and the columns so far.

    A pivoted partial Cholesky factorisation: rows of the residual Gram matrix are made only when they are picked, so a
    column costs (kh r + k + n) p instead of p^2.
    """
    gram, cross = moments
    p, n, block, dtype = gram.shape[0], cross.shape[0], options.block, gram.dtype
    _, aim, filtered = _second(first, moments, used, jnp.asarray(0, dtype))
    inner = jnp.einsum("ajq,tq->ajt", filtered.reshape(aim.shape[1], p // first.shape[1], -1), first)
    rows = aim.shape[1]
    flags = jnp.tile(used, p // first.shape[1])
    basis = _orthonormal(filtered, inner.reshape(rows, rows), flags) * flags.astype(dtype)[:, None]
    z = _orthonormal(aim.T, inner.reshape(rows, rows), flags)
    whole = jnp.diagonal(gram)

    def pick(s: _Greedy) -> _Greedy:
        free = jnp.logical_not(s.columns) & (s.diagonal > 1e3 * jnp.finfo(dtype).eps * whole)
        score = jnp.where(free, jnp.sum(s.left * s.left, axis=0) / jnp.where(free, s.diagonal, 1), -1)
        scores, picked = lax.top_k(score, block)
        good = (s.count + jnp.arange(block) < count) & (scores >= 0)
        flag = good.astype(dtype)
        new = (gram[picked] - s.basis[:, picked].T @ s.basis) * flag[:, None]
        level = jnp.where(good, 0, 1).astype(dtype) + 1e-6 * jnp.diagonal(new[:, picked]) * (block > 1)
        chol = jnp.linalg.cholesky(new[:, picked] * flag[None, :] + jnp.diag(level))
        new = solve_triangular(chol, new, lower=True)
        gain = solve_triangular(chol, (s.left[:, picked] * flag[None, :]).T, lower=True)
        return _Greedy(
            basis=lax.dynamic_update_slice(s.basis, new, (rows + s.count, jnp.zeros_like(s.count))),
            left=s.left - gain.T @ new,
            diagonal=s.diagonal - jnp.sum(new * new, axis=0),
            columns=s.columns.at[picked].set(s.columns[picked] | good),
            count=s.count + block,
        )

    start = _Greedy(
        basis=jnp.zeros((rows + max_columns + block, p), dtype).at[:rows].set(basis),
        left=cross - z.T @ basis,
        diagonal=whole - jnp.sum(basis * basis, axis=0),
        columns=jnp.zeros(p, bool),
        count=jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(lambda s: s.count < count, pick, start).columns


@partial(jax.jit, static_argnames=("window", "gauge", "options"))
def select(
    stats: GramStatistics,
    w: Float[Array, "n p"],
    window: tuple[int, ...],
    budget: Int[Array, ""] | int,
    rank: Int[Array, ""] | int,
    *,
    gauge: bool = True,
    options: SpatialOptions = SpatialOptions(),
) -> SpatialColumns:
    n, p = w.shape
    rows, q, dtype = window[0], p // window[0], w.dtype
    bound = options.max_rank or rank_bound(n, p, window)
    max_columns = min(p, options.max_columns if options.max_columns is not None else p)
    rank = jnp.minimum(jnp.asarray(rank, jnp.int32), _largest_rank(budget, n, q, rows, bound, gauge))
    used = jnp.arange(bound) < rank
    count = jnp.clip((budget - pair_cost(rank, n, q, rows, gauge=gauge)) // n, 0, max_columns).astype(jnp.int32)
    moments = _Moments(stats.gram, stats.cross)
    first = _weighted_svd(w, stats.gram, q, bound) * used.astype(dtype)[:, None]
    zero = jnp.zeros((), dtype)

    def turn(i, state):
        first, columns, best = state
        left = _project_columns_out(moments, columns, max_columns)
        energy = stats.target_energy - left.explained
        first, value = _fit_first(first, left.moments, used, energy, options)
        found = SpatialColumns(first=first, rank=rank, columns=columns, error=(energy + value) / stats.target_energy)
        better = found.error < best.error
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), found, best)
        columns = lax.cond(i < options.rounds, lambda f: _greedy_columns(f, moments, used, count, options, max_columns), lambda f: columns, first)
        return first, columns, best

    nothing = jnp.zeros(p, bool)
    best = SpatialColumns(first=first, rank=rank, columns=nothing, error=jnp.full((), jnp.inf, dtype))
    return lax.fori_loop(0, options.rounds + 1, turn, (first, nothing, best))[2]
