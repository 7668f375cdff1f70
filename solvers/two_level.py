"""The two-level form: a on the columns S1, b = u v with v on S2 minus S1 only, everything else zero; S1 within S2.

Minimises over S1, S2 and a, b of rank r, for a budget of stored values, the linear error

    F = tr((w - a - b) gram (w - a - b)').

With the span U of b's columns fixed, F is the sum of two column selections, of (I - UU')w on S1 and of U'w on S2; with
S1 and S2 fixed, U is an eigenproblem (Anderson 1951): the optimum is tr R(S2) plus the eigenvalues of R(S1) - R(S2)
beyond the r-th, R(S) being what columns S leave of w gram w'. A column costs r on S2 minus S1 and n on S1, U costs
r (n - r) stored with an identity block (`gauge`) and r n without.

The selection for fixed U is ADMM in constraint form with a growing penalty parameter, after ALPS (Meng et al., 2024)
and 3BASiL (2025), with a knapsack as the projection; then exchanges by exact error.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from solvers import columns
from solvers.gram import GramStatistics


@dataclass(frozen=True, kw_only=True)
class TwoLevelOptions:
    """Schedule of the selection; static under jit.

    Attributes:
        rounds: selections for fixed U, each followed by the best U for what it selected.
        rho: first penalty parameter, on a gram of unit diagonal.
        growth: factors on rho when the support changed by more than 5 %, more than 0.25 %, less.
        check_every: ADMM steps between checks of the support.
        patience: checks without a change before ADMM stops.
        max_steps: limit on the ADMM steps of a round.
        polish: rounds of exchanges by exact error, each followed by the best U.
        max_exchanges: columns moved in such a round.
        greedy: whether `best` tries the greedy path too.
    """

    rounds: int = 3
    rho: float = 0.03
    growth: tuple[float, float, float] = (1.1, 1.05, 1.02)
    check_every: int = 3
    patience: int = 5
    max_steps: int = 150
    polish: int = 3
    max_exchanges: int = 100
    greedy: bool = True


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TwoLevel:
    """What a two-level form keeps. `structure.column_structure` makes a fit of it.

    Attributes:
        free: S1, (p,).
        tail: S2 minus S1, (p,).
        rank: r; 0 exactly when `tail` is empty.
        error: relative linear error after the refit, as `gram.linear_error` measures it.
    """

    free: Bool[Array, " p"]
    tail: Bool[Array, " p"]
    rank: Int[Array, ""]
    error: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Problem:
    """The problem on a gram of unit diagonal, with rows turned into at most p equivalent ones."""

    gram: Array
    w: Array
    cross: Array
    values: Array
    vectors: Array
    rest: Array
    scale: Array
    n: int = field(metadata={"static": True})
    gauge: bool = field(metadata={"static": True})


def cost(
    free: Bool[Array, " p"], tail: Bool[Array, " p"], rank: Int[Array, ""], n: int, *, gauge: bool = True
) -> Int[Array, ""]:
    """Stored values of a two-level form: n k1 + r (k2 - k1) + r (n - r), or + r n without the gauge."""
    return n * jnp.sum(free) + rank * jnp.sum(tail) + _basis_cost(rank, n, gauge)


def _basis_cost(rank: Array, n: int, gauge: bool) -> Array:
    return rank * (n - rank) if gauge else rank * n


def _prepare(stats: GramStatistics, w: Array, gauge: bool, spectrum: bool = True) -> _Problem:
    n, p = w.shape
    gram, wide = columns.unit_diagonal(stats.gram, w)
    if n > p:
        wide = jnp.linalg.qr(wide, mode="r")
    cross = wide @ gram
    values, vectors = jnp.linalg.eigh(gram) if spectrum else (jnp.zeros(p, gram.dtype), gram)
    energy = stats.target_energy
    return _Problem(
        gram=gram,
        w=wide,
        cross=cross,
        values=jnp.maximum(values, 0),
        vectors=vectors,
        rest=jnp.maximum(energy - jnp.sum(cross * wide), 0),
        scale=jnp.where(energy > 0, energy, jnp.ones_like(energy)),
        n=n,
        gauge=gauge,
    )


def _leading(square: Array, rank: Array) -> tuple[Array, Array]:
    """Eigenvectors of the `rank` largest eigenvalues, zero columns for the others; and the sum of the others."""
    values, vectors = jnp.linalg.eigh(square)
    top = jnp.arange(square.shape[0]) >= square.shape[0] - rank
    return jnp.where(top[None, :], vectors, 0), jnp.sum(jnp.where(top, 0, jnp.maximum(values, 0)))


def _closed_form(problem: _Problem, free: Array, both: Array, rank: Array) -> tuple[Array, Array]:
    """The best U for S1 = free, S2 = both, and F there."""
    level = jnp.where(free, 0, jnp.where(both, 1, 2))
    order = jnp.argsort(level, stable=True)
    z = problem.w[:, order] @ jnp.linalg.cholesky(problem.gram[order][:, order])
    level = level[order][None, :]
    tail = jnp.where(level == 1, z, 0)
    u, lost = _leading(tail @ tail.T, rank)
    return u, lost + jnp.sum(jnp.where(level == 2, z * z, 0))


def _project(problem: _Problem, e: Array, u: Array, rank: Array, room: Array) -> tuple[Array, Array, Array]:
    """Knapsack projection of e by energy per stored value: (nearest matrix, S1, S2).

    U'e_j costs r, (I - UU')e_j another n - r; where the second has the better ratio both go together, so that S1 stays
    within S2. Items are taken in order while they fit into `room`.
    """
    n, p = problem.n, e.shape[1]
    inner = u.T @ e
    energy_u = jnp.sum(inner * inner, axis=0)
    energy = jnp.sum(e * e, axis=0)
    prices = jnp.stack([rank, n - rank])
    ratio = jnp.stack([energy_u, energy - energy_u]) / jnp.maximum(prices, 1).astype(e.dtype)[:, None]
    ratio = jnp.where((prices > 0)[:, None], ratio, jnp.inf)
    score = jnp.where((ratio[1] > ratio[0])[None, :], (energy / n)[None, :], ratio).reshape(-1)
    order = jnp.argsort(-score, stable=True)
    spent = jnp.cumsum(jnp.repeat(prices, p)[order])
    taken = jnp.zeros(2 * p, bool).at[order].set(spent <= room)
    both, free = taken[:p], taken[p:] & taken[:p]
    low = u @ inner
    return jnp.where(both[None, :], low, 0) + jnp.where(free[None, :], e - low, 0), free, both


def _admm(problem: _Problem, u: Array, rank: Array, room: Array, options: TwoLevelOptions) -> tuple[Array, Array]:
    """S1 and S2 for a fixed U by ADMM in constraint form."""
    q, dtype = problem.vectors, problem.gram.dtype
    p = problem.gram.shape[0]

    def step(_: Array, s: tuple) -> tuple:
        d, dual, rho, _, _ = s
        c = ((problem.cross - dual + rho * d) @ q / (problem.values + rho)[None, :]) @ q.T
        d, free, both = _project(problem, c + dual / rho, u, rank, room)
        return d, dual + rho * (c - d), rho, free, both

    def check(s: tuple) -> tuple:
        (d, dual, rho, free, both), still, steps = s
        new = lax.fori_loop(0, options.check_every, step, (d, dual, rho, free, both))
        changed = jnp.sum(new[3] != free) + jnp.sum(new[4] != both)
        share = changed.astype(dtype) / jnp.maximum(jnp.sum(new[3]) + jnp.sum(new[4]), 1).astype(dtype)
        fast, middle, slow = options.growth
        rho = rho * jnp.where(share > 0.05, fast, jnp.where(share > 0.0025, middle, slow)).astype(dtype)
        return (new[0], new[1], rho, new[3], new[4]), jnp.where(changed == 0, still + 1, 0), steps + options.check_every

    none = jnp.zeros(p, bool)
    start = (problem.w, jnp.zeros_like(problem.w), jnp.asarray(options.rho, dtype), none, none)
    going = lambda s: (s[1] < options.patience) & (s[2] < options.max_steps)  # noqa: E731
    return lax.while_loop(going, check, (start, jnp.zeros((), jnp.int32), 0))[0][3:]


def _exchange(
    problem: _Problem, u: Array, rank: Array, room: Array, masks: tuple[Array, Array], limit: int
) -> tuple[Array, Array]:
    """Fills what is left of the room, then overfills by one move and empties again while F falls (U fixed).

    A move puts a column into S2, raises one from S2 to S1, or does both at once; or the reverse of these. Adding takes
    the best fall of F per stored value, removing the least rise per stored value that is over the room.
    """
    p, dtype = problem.gram.shape[0], problem.gram.dtype
    prices = jnp.stack([rank, problem.n - rank, jnp.full_like(rank, problem.n)])
    inner = u.T @ problem.w

    def spent(free: Array, both: Array) -> Array:
        return prices[0] * jnp.sum(both) + prices[1] * jnp.sum(free)

    def choose(low: Array, high: Array, free: Array, both: Array) -> tuple[Array, Array, Array, Array, Array]:
        left = room - spent(free, both)
        over = left < 0
        change = jnp.stack([low, high, low + high])
        tail = both & ~free
        into, out = jnp.stack([~both, tail, ~both]), jnp.stack([tail, free, free])
        fits = into & (prices <= left)[:, None]
        ended = ~over & ~jnp.any(fits)
        allowed = jnp.where(over, out, jnp.where(ended, into, fits))
        worth = jnp.where(over, jnp.minimum(prices, -left), prices)
        ratio = change / jnp.maximum(worth, 1).astype(dtype)[:, None]
        i = jnp.argmax(jnp.where(allowed, jnp.where(over, -ratio, ratio), -jnp.inf).reshape(-1))
        delta = change.reshape(-1)[i] * jnp.where(over, 1, -1).astype(dtype)
        return i // p, i % p, delta, ended, jnp.any(allowed)

    def body(s: tuple) -> tuple:
        one, two, free, both, f, best, kept, num, _ = s
        kind, j, delta, ended, possible = choose(
            columns.sweep_scores(*two), columns.sweep_scores(*one), free, both
        )
        better = ended & (f < best)
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), (free, both), kept)
        going = possible & (better | ~ended)
        best = jnp.where(better, f - 100 * jnp.finfo(dtype).eps * jnp.sum(problem.scale), best)
        same = lambda q, c, j: (q, c)  # noqa: E731
        one = lax.cond(going & (kind >= 1), columns.sweep, same, *one, j)
        two = lax.cond(going & (kind != 1), columns.sweep, same, *two, j)
        free = jnp.where(going & (kind >= 1), free.at[j].set(~free[j]), free)
        both = jnp.where(going & (kind != 1), both.at[j].set(~both[j]), both)
        return one, two, free, both, f + delta, best, kept, num + 1, going

    free, both = masks
    one = columns.swept(problem.gram, problem.w - u @ inner, free)
    two = columns.swept(problem.gram, inner, both)
    zero = jnp.zeros((), dtype)
    start = (one, two, free, both, zero, jnp.asarray(jnp.inf, dtype), masks, jnp.zeros((), jnp.int32), jnp.asarray(True))
    return lax.while_loop(lambda s: s[8] & (s[7] < limit), body, start)[6]
