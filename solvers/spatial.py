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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num

from solvers.gram import GramStatistics
from solvers.spatial_factor import Moments, feature_moments, fit_first, mean_block, orthonormal, weighted_svd


@dataclass(frozen=True, kw_only=True)
class SpatialOptions:
    """Static options: they shape the compiled program. The defaults suit p up to about 1500; see `for_size`.

    Attributes:
        max_rank: rows of the padded first factor; ranks above it are cut. None: `rank_bound`.
        max_columns: most single columns ever chosen. None: p.
        rounds: times that columns are chosen and the first factor is solved again.
        max_steps: L-BFGS steps per solve of the first factor.
        memory: pairs that L-BFGS remembers.
        rtol: L-BFGS stops when a step lowers the error by less than this fraction of it.
        block: columns chosen at a time; 1 is the plain greedy rule; blocks save time when p is in the thousands.
        fractions: ranks that `best` tries, as fractions of the largest rank whose factors alone fit the budget.
    """

    max_rank: int | None = None
    max_columns: int | None = None
    rounds: int = 3
    max_steps: int = 30
    memory: int = 8
    rtol: float = 1e-4
    block: int = 1
    fractions: tuple[float, ...] = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0)

    @classmethod
    def for_size(cls, n: int, p: int, window: tuple[int, ...]) -> "SpatialOptions":
        """The defaults up to p = 1500; above, fewer steps, one round, blocks of columns and tighter bounds."""
        if p <= 1500:
            return cls()
        bound = max(1, 3 * rank_bound(n, p, window) // 4)
        fractions = (0.75, 0.95) if p <= 3000 else (0.9,)
        return cls(
            max_rank=bound,
            max_columns=p // 6,
            rounds=1,
            max_steps=8,
            memory=4,
            rtol=1e-3,
            block=16,
            fractions=fractions,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SpatialColumns:
    """What the form keeps. The second factor and the columns' values are left to the refit.

    Attributes:
        first: (r_max, kw * c_in), rows from `rank` on are zero; the others are uncorrelated features of unit energy
            (mean over the kernel rows).
        rank: r, at most r_max.
        columns: (p,), the single columns.
        error: relative squared linear error after the least-squares fit, 0 is perfect; inf when the moments were not
            finite or not positive definite.
    """

    first: Float[Array, "r_max q"]
    rank: Int[Array, ""]
    columns: Bool[Array, " p"]
    error: Float[Array, ""]


def rank_bound(n: int, p: int, window: tuple[int, ...]) -> int:
    """The rank at which a plain pair of factors stores as much as the dense kernel: n p / (kw c_in + kh n)."""
    q = p // window[0]
    return max(1, min(n * p // (q + window[0] * n), q, window[0] * n))


def pair_cost(
    rank: Int[Array, "*ranks"],
    n: int,
    q: int,
    rows: int,
    *,
    gauge: Bool[ArrayLike, ""],
    pivot_cost: Num[ArrayLike, ""] = 0.0,
) -> Float[Array, "*ranks"]:
    """Stored values of the two factors of rank r: r q + r kh n; in gauge form - r^2 + r pivot_cost.

    float32 is exact up to 2^24 values; it lets the cost of a pivot's index be a fraction of a value.
    """
    r = rank.astype(jnp.float32)
    cost = r * (q + rows * n)
    return jnp.where(jnp.asarray(gauge), cost - r * r + r * jnp.asarray(pivot_cost, jnp.float32), cost)


def rank_grid(
    n: int,
    p: int,
    window: tuple[int, ...],
    budget: Num[ArrayLike, ""],
    *,
    gauge: bool = True,
    pivot_cost: Num[ArrayLike, ""] = 0.0,
    fractions: tuple[float, ...] = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0),
    max_rank: int | None = None,
) -> Int[Array, " ranks"]:
    """Ranks to try: fractions of the largest rank whose factors alone fit the budget (at most `max_rank`).

    The best rank was 0.7-1 of the largest one on 64 x 576 and 32 x 288 layers, 0.15-0.7 on 16 x 144 ones.
    """
    bound = rank_bound(n, p, window) if max_rank is None else max_rank
    largest = _largest_rank(
        pair_cost(
            jnp.arange(bound + 1, dtype=jnp.int32), n, p // window[0], window[0], gauge=gauge, pivot_cost=pivot_cost
        ),
        budget,
    )
    scaled = largest.astype(jnp.float32) * jnp.asarray(fractions, jnp.float32)
    return jnp.floor(scaled + 0.5).astype(jnp.int32)


def _largest_rank(costs: Float[Array, " ranks"], budget: Num[ArrayLike, ""]) -> Int[Array, ""]:
    # costs increase with the rank: it is at most min(q, rows n)
    return jnp.maximum(jnp.sum(costs <= jnp.asarray(budget, jnp.float32)).astype(jnp.int32) - 1, 0)


class _Projected(NamedTuple):
    moments: Moments
    explained: Float[Array, ""]


def _project_columns_out(moments: Moments, columns: Bool[Array, " p"], max_columns: int) -> _Projected:
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
    return _Projected(Moments(gram, (cross - z.T @ white) * outside[None, :]), jnp.sum(z * z))


class _Greedy(NamedTuple):
    basis: Float[Array, "size p"]
    left: Float[Array, "n p"]
    diagonal: Float[Array, " p"]
    columns: Bool[Array, " p"]
    count: Int[Array, ""]


def _greedy_columns(
    first: Float[Array, "r q"],
    moments: Moments,
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
    p, block, dtype = gram.shape[0], min(options.block, gram.shape[0]), gram.dtype
    inner, filtered, aim = feature_moments(first, moments)
    rows, flags = aim.shape[1], jnp.tile(used, p // first.shape[1])
    white = orthonormal(jnp.concatenate([filtered, aim.T], axis=1), inner, flags) * flags.astype(dtype)[:, None]
    basis, z = white[:, :p], white[:, p:]
    whole = jnp.diagonal(gram)

    def pick(s: _Greedy) -> _Greedy:
        free = jnp.logical_not(s.columns) & (s.diagonal > 1e3 * jnp.finfo(dtype).eps * whole)
        score = jnp.where(free, jnp.sum(s.left * s.left, axis=0) / jnp.where(free, s.diagonal, 1), -1)
        scores, picked = lax.top_k(score, block)
        good = (s.count + jnp.arange(block, dtype=jnp.int32) < count) & (scores >= 0)
        flag = good.astype(dtype)
        new = (gram[picked] - s.basis[:, picked].T @ s.basis) * flag[:, None]
        ridge = 1e-6 if block > 1 else 0.0  # columns of one block may be nearly equal
        level = jnp.where(good, 0, 1).astype(dtype) + ridge * jnp.diagonal(new[:, picked])
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


def _check(
    stats: GramStatistics, w: Float[Array, "n p"], window: tuple[int, ...], options: SpatialOptions
) -> tuple[int, int]:
    """(max_rank, max_columns), or a ValueError."""
    n, p = w.shape
    if p % (window[0] * window[1]):
        raise ValueError(f"w has {p} columns, not a multiple of the window {window}; pass kh * kw * c_in columns")
    if stats.cross.shape != w.shape:
        raise ValueError(f"stats.cross has shape {stats.cross.shape}, w {w.shape}; compute both from one layer")
    most = min(p // window[0], window[0] * n)
    bound = rank_bound(n, p, window) if options.max_rank is None else options.max_rank
    if not 1 <= bound <= most:
        raise ValueError(f"options.max_rank={bound}: must be between 1 and min(kw c_in, kh n) = {most}")
    columns = p if options.max_columns is None else options.max_columns
    if not 1 <= columns <= p:
        raise ValueError(f"options.max_columns={columns}: must be between 1 and p = {p}")
    smallest = min(options.rounds + 1, options.max_steps, options.memory, options.block)
    if smallest < 1:
        raise ValueError(f"options={options}: rounds must be >= 0; max_steps, memory and block >= 1")
    return bound, columns


class _Price(NamedTuple):
    """What a form may cost; all traced."""

    budget: Float[Array, ""]
    pivot_cost: Float[Array, ""]
    gauge: Bool[Array, ""]
    round_to: Int[Array, ""]


def _allocate(
    rank: Int[Array, ""], price: _Price, shape: tuple[int, int, int], bound: int, max_columns: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """(rank, columns) within the budget: the rank is cut if it must be, columns take what is left, rounded down."""
    n, p, q = shape
    costs = pair_cost(
        jnp.arange(bound + 1, dtype=jnp.int32), n, q, p // q, gauge=price.gauge, pivot_cost=price.pivot_cost
    )
    rank = jnp.clip(rank.astype(jnp.int32), 0, _largest_rank(costs, price.budget))
    left_over = price.budget - costs[rank]
    count = jnp.clip(jnp.floor(left_over / n), 0, max_columns).astype(jnp.int32)
    return rank, count // price.round_to * price.round_to


def _better(new: SpatialColumns, old: SpatialColumns) -> SpatialColumns:
    """The one of lower error; the old one if the new error is NaN."""
    lower = new.error < old.error
    return jax.tree.map(lambda a, b: jnp.where(lower, a, b), new, old)


def _solve_rank(
    stats: GramStatistics,
    start: Float[Array, "r_max q"],
    rank: Int[Array, ""],
    price: _Price,
    options: SpatialOptions,
    max_columns: int,
) -> SpatialColumns:
    """Alternate between the first factor and the columns; the best pair met."""
    (n, p), (bound, q), dtype = stats.cross.shape, start.shape, start.dtype
    rank, count = _allocate(rank, price, (n, p, q), bound, max_columns)
    used = jnp.arange(bound, dtype=jnp.int32) < rank
    moments = Moments(stats.gram, stats.cross)
    total = jnp.where(stats.target_energy > 0, stats.target_energy, jnp.ones_like(stats.target_energy))

    def turn(
        i: Array, state: tuple[Array, Bool[Array, " p"], SpatialColumns]
    ) -> tuple[Array, Bool[Array, " p"], SpatialColumns]:
        first, columns, best = state
        rest, explained = _project_columns_out(moments, columns, max_columns)
        energy = stats.target_energy - explained
        first, value = fit_first(
            first, rest, used, energy, max_steps=options.max_steps, memory=options.memory, rtol=options.rtol
        )
        found = SpatialColumns(first=first, rank=rank, columns=columns, error=(energy + value) / total)
        best = _better(found, best)

        def choose(b: Array) -> Array:
            return _greedy_columns(b, moments, used, count, options, max_columns)

        return first, lax.cond(i < options.rounds, choose, lambda b: columns, first), best

    nothing = jnp.zeros(p, bool)
    start = start * used.astype(dtype)[:, None]
    best = SpatialColumns(first=start, rank=rank, columns=nothing, error=jnp.full((), jnp.inf, dtype))
    best = lax.fori_loop(0, options.rounds + 1, turn, (start, nothing, best))[2]
    block = mean_block(stats.gram, q)
    first = orthonormal(best.first, best.first @ block @ best.first.T, used)
    return SpatialColumns(first=first, rank=rank, columns=best.columns, error=best.error)


@partial(jax.jit, static_argnames=("window", "options"))
def _best(
    stats: GramStatistics,
    w: Float[Array, "n p"],
    window: tuple[int, ...],
    ranks: Int[Array, " ranks"],
    price: _Price,
    options: SpatialOptions,
) -> SpatialColumns:
    bound, max_columns = _check(stats, w, window, options)
    start = weighted_svd(w, stats.gram, w.shape[1] // window[0], bound)
    nothing = SpatialColumns(
        first=jnp.zeros_like(start),
        rank=jnp.zeros((), jnp.int32),
        columns=jnp.zeros(w.shape[1], bool),
        error=jnp.full((), jnp.inf, w.dtype),
    )

    def step(winner: SpatialColumns, rank: Array) -> tuple[SpatialColumns, None]:
        found = _solve_rank(stats, start, rank, price, options, max_columns)
        return _better(found, winner), None

    return lax.scan(step, nothing, ranks)[0]


def best(
    stats: GramStatistics,
    w: Float[Array, "n p"],
    window: tuple[int, ...],
    budget: Num[ArrayLike, ""],
    ranks: Int[ArrayLike, " ranks"] | None = None,
    *,
    gauge: bool = True,
    pivot_cost: Num[ArrayLike, ""] = 0.0,
    round_to: Int[ArrayLike, ""] = 1,
    options: SpatialOptions | None = None,
) -> SpatialColumns:
    """First factor and columns of least linear error within the budget, over a grid of ranks.

    Minimises F(b, S) (top of this file) over r, b (r, kw c_in) and |S| = k subject to

        r kw c_in + r kh n (- r^2 + r pivot_cost in gauge form) + n k <= budget.

    For each rank a local optimum: b and S are found by turns, from the SVD of w weighted by the data; k follows from
    the budget. Compiled once per (n, p, window, number of ranks, options).

    Args:
        stats: moments, with a ridge: gram must be positive definite in its own precision.
        w: (n, p), the least-squares matrix of the same moments; where the search starts.
        window: (kh, kw); the columns of w are ordered (i, j, channel), channel fastest.
        budget: stored values, traced. Indices of columns are not counted.
        ranks: ranks to try, traced; each is cut until its two factors fit. None: `rank_grid` of options.fractions.
        gauge: whether the first factor is stored with an r x r identity block.
        pivot_cost: price of the index of one column of that block, in values, traced.
        round_to: the number of columns is rounded down to a multiple of it, traced.
        options: static. None: `SpatialOptions.for_size`.

    Returns:
        What is kept, never above the budget (nothing, if the budget is below one column and one rank).

    Raises:
        ValueError: the window does not have two axes or does not divide p, shapes or options do not fit.
    """
    n, p = w.shape
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"window={window}: spatial low rank needs a kernel with two axes; use another form here")
    options = SpatialOptions.for_size(n, p, window) if options is None else options
    if ranks is None:
        ranks = rank_grid(
            n,
            p,
            window,
            budget,
            gauge=gauge,
            pivot_cost=pivot_cost,
            fractions=options.fractions,
            max_rank=options.max_rank,
        )
    numbers = jnp.asarray(budget, jnp.float32), jnp.asarray(pivot_cost, jnp.float32)
    price = _Price(*numbers, jnp.asarray(gauge), jnp.asarray(round_to, jnp.int32))
    return _best(stats, w, tuple(window), jnp.asarray(ranks, jnp.int32), price, options)


def select(
    stats: GramStatistics,
    w: Float[Array, "n p"],
    window: tuple[int, ...],
    budget: Num[ArrayLike, ""],
    rank: Int[ArrayLike, ""],
    *,
    gauge: bool = True,
    pivot_cost: Num[ArrayLike, ""] = 0.0,
    round_to: Int[ArrayLike, ""] = 1,
    options: SpatialOptions | None = None,
) -> SpatialColumns:
    """`best` for a single rank, traced."""
    ranks = jnp.asarray(rank)[None]
    price = {"gauge": gauge, "pivot_cost": pivot_cost, "round_to": round_to}
    return best(stats, w, window, budget, ranks, **price, options=options)


def features(
    first: Float[Array, "r_max q"],
    rank: Int[ArrayLike, ""],
    columns: Bool[ArrayLike, " p"],
    window: tuple[int, ...],
    c_in: int,
) -> tuple[Float[Array, "kr_plus_p p"], Bool[Array, " kr_plus_p"]]:
    """All candidate features as combinations of inputs, and which of them the form has.

    kh * r_max spatial features (kernel row slowest), then the p single columns: the arguments of
    `structure.feature_structure`.

    Raises:
        ValueError: `first` does not have kw * c_in columns.
    """
    if len(window) != 2 or first.shape[1] != window[1] * c_in:
        raise ValueError(f"first has {first.shape[1]} columns; window={window}, c_in={c_in} ask for kw * c_in of them")
    rows, (bound, q), dtype = window[0], first.shape, first.dtype
    spatial = jnp.kron(jnp.eye(rows, dtype=dtype), first)
    used = jnp.tile(jnp.arange(bound, dtype=jnp.int32) < jnp.asarray(rank, jnp.int32), rows)
    flags = jnp.concatenate([used, jnp.asarray(columns)])
    return jnp.concatenate([spatial, jnp.eye(rows * q, dtype=dtype)]), flags
