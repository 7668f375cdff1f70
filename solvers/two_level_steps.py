"""The parts of two-level selection: the best U for given columns, and columns for a given U three ways.

See `two_level` for the objective. With U fixed, columns come from ADMM in constraint form (`admm`), from OBS paths
(`greedy_path`), or from exchanges that start at given ones (`exchange`).
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from solvers import columns
from solvers.gram import GramStatistics
from solvers.pivots import no_pivots, pivot, swept


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
        pure_columns: whether `best` tries pure columns too.
        finalists: ranks that `best` solves in full.
        screen_steps: limit on the ADMM steps with which `best` compares the ranks.
        screen_growth: growth there.
    """

    rounds: int = 3
    rho: float = 0.03
    growth: tuple[float, float, float] = (1.1, 1.05, 1.02)
    check_every: int = 3
    patience: int = 5
    max_steps: int = 150
    polish: int = 2
    max_exchanges: int = 100
    greedy: bool = True
    pure_columns: bool = True
    finalists: int = 2
    screen_steps: int = 45
    screen_growth: tuple[float, float, float] = (1.3, 1.2, 1.1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TwoLevelProblem:
    """The problem on a gram of unit diagonal, with rows turned into m = min(n, p) equivalent ones.

    Attributes:
        gram: scaled, with the ridge of `columns.unit_diagonal`.
        w: scaled.
        cross: w gram.
        values: eigenvalues of gram.
        vectors: its eigenvectors, one a column.
        rest: what w itself leaves of the target's energy.
        scale: the target's energy, 1 if that is 0.
        gauge: whether u is stored with an identity block.
        n: outputs, which prices count.
    """

    gram: Float[Array, "p p"]
    w: Float[Array, "m p"]
    cross: Float[Array, "m p"]
    values: Float[Array, " p"]
    vectors: Float[Array, "p p"]
    rest: Float[Array, ""]
    scale: Float[Array, ""]
    gauge: Bool[Array, ""]
    n: int = field(metadata={"static": True})


def basis_cost(rank: Int[Array, "*ranks"], n: int, gauge: Bool[ArrayLike, ""]) -> Int[Array, "*ranks"]:
    """Stored values of u."""
    return rank * jnp.where(gauge, n - rank, n)


def prepare(
    stats: GramStatistics, w: Float[Array, "n p"], gauge: Bool[ArrayLike, ""], spectrum: bool = True
) -> TwoLevelProblem:
    """The problem in the form selection works on; the eigenvectors of gram, needed by `admm` only, on demand."""
    n, p = w.shape
    gram, wide = columns.unit_diagonal(stats.gram, w)
    if n > p:
        wide = jnp.linalg.qr(wide, mode="r")
    cross = wide @ gram
    values, vectors = jnp.linalg.eigh(gram) if spectrum else (jnp.zeros(p, gram.dtype), gram)
    energy = stats.target_energy
    return TwoLevelProblem(
        gram=gram,
        w=wide,
        cross=cross,
        values=jnp.maximum(values, 0),
        vectors=vectors,
        rest=jnp.maximum(energy - jnp.sum(cross * wide), 0),
        scale=jnp.where(energy > 0, energy, jnp.ones_like(energy)),
        n=n,
        gauge=jnp.asarray(gauge),
    )


def leading(square: Float[Array, "m m"], rank: Int[Array, ""]) -> tuple[Float[Array, "m m"], Float[Array, ""]]:
    """Eigenvectors of the `rank` largest eigenvalues, zero columns for the others; and the sum of the others."""
    values, vectors = jnp.linalg.eigh(square)
    top = jnp.arange(square.shape[0]) >= square.shape[0] - rank
    return jnp.where(top[None, :], vectors, 0), jnp.sum(jnp.where(top, 0, jnp.maximum(values, 0)))


def closed_form(
    problem: TwoLevelProblem, free: Bool[Array, " p"], both: Bool[Array, " p"], rank: Int[Array, ""]
) -> tuple[Float[Array, "m m"], Float[Array, ""]]:
    """The best U for S1 = free, S2 = both, and F there."""
    level = jnp.where(free, 0, jnp.where(both, 1, 2))
    order = jnp.argsort(level, stable=True)
    z = problem.w[:, order] @ jnp.linalg.cholesky(problem.gram[order][:, order])
    level = level[order][None, :]
    tail = jnp.where(level == 1, z, 0)
    u, lost = leading(tail @ tail.T, rank)
    return u, lost + jnp.sum(jnp.where(level == 2, z * z, 0))


def project(
    problem: TwoLevelProblem, e: Float[Array, "m p"], u: Float[Array, "m m"], rank: Int[Array, ""], room: Int[Array, ""]
) -> tuple[Float[Array, "m p"], Bool[Array, " p"], Bool[Array, " p"]]:
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


def admm(
    problem: TwoLevelProblem,
    u: Float[Array, "m m"],
    rank: Int[Array, ""],
    room: Int[Array, ""],
    options: TwoLevelOptions,
) -> tuple[Bool[Array, " p"], Bool[Array, " p"]]:
    """S1 and S2 for a fixed U by ADMM in constraint form."""
    q, dtype = problem.vectors, problem.gram.dtype
    p = problem.gram.shape[0]

    def step(_: Array, s: tuple) -> tuple:
        d, dual, rho, _, _ = s
        c = ((problem.cross - dual + rho * d) @ q / (problem.values + rho)[None, :]) @ q.T
        d, free, both = project(problem, c + dual / rho, u, rank, room)
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
    return lax.while_loop(going, check, (start, jnp.zeros((), int), 0))[0][3:]


def exchange(
    problem: TwoLevelProblem,
    u: Float[Array, "m m"],
    rank: Int[Array, ""],
    room: Int[Array, ""],
    masks: tuple[Bool[Array, " p"], Bool[Array, " p"]],
    limit: int,
) -> tuple[Bool[Array, " p"], Bool[Array, " p"]]:
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
        # Moves without gain only fill the buffers: with r = 0 every column may enter S2 for nothing.
        into = jnp.stack([~both, tail, ~both]) & (change > 0)
        out = jnp.stack([tail, free, free])
        fits = into & (prices <= left)[:, None]
        ended = ~over & ~jnp.any(fits)
        allowed = jnp.where(over, out, jnp.where(ended, into, fits))
        worth = jnp.where(over, jnp.minimum(prices, -left), prices)
        ratio = change / jnp.maximum(worth, 1).astype(dtype)[:, None]
        i = jnp.argmax(jnp.where(allowed, jnp.where(over, -ratio, ratio), -jnp.inf).reshape(-1))
        delta = change.reshape(-1)[i] * jnp.where(over, 1, -1).astype(dtype)
        return i // p, i % p, delta, ended, jnp.any(allowed)

    def body(s: tuple) -> tuple:
        one, two, free, both, f, best, kept, _ = s
        kind, j, delta, ended, possible = choose(two.scores, one.scores, free, both)
        better = ended & (f < best)
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), (free, both), kept)
        best = jnp.where(better, f - tolerance, best)
        going = possible & (better | ~ended)
        raised, moved = going & (kind >= 1), going & (kind != 1)
        one = pivot(*base_one, one, j, raised, sweeps=True)
        two = pivot(*base_two, two, j, moved, sweeps=True)
        free, both = free.at[j].set(free[j] ^ raised), both.at[j].set(both[j] ^ moved)
        return one, two, free, both, f + delta, best, kept, going

    free, both = masks
    base_one = swept(problem.gram, problem.w - u @ inner, free)
    base_two = swept(problem.gram, inner, both)
    tolerance = 100 * jnp.finfo(dtype).eps * problem.scale
    states = tuple(no_pivots(*base, limit) for base in (base_one, base_two))
    start = (*states, free, both, jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype), masks, jnp.asarray(True))
    # Each move pivots at least one of the two; neither may run out of room.
    more = lambda s: s[7] & (jnp.maximum(s[0].num, s[1].num) < limit)  # noqa: E731
    end: tuple = lax.while_loop(more, body, start)
    return end[6]


def greedy_path(
    problem: TwoLevelProblem, u: Float[Array, "m m"], rank: Int[Array, ""], room: Int[Array, ""]
) -> tuple[Bool[Array, " p"], Bool[Array, " p"]]:
    """S1 and S2 for a fixed U from OBS paths: (I - UU')w gives the order of S1, U'w that of S2.

    Their sizes are where the two error curves, added, are lowest within the room; S2's path is then run again with
    S1 locked.
    """
    gram, n = problem.gram, problem.n
    p = gram.shape[0]
    inner = u.T @ problem.w
    rest = problem.w - u @ inner
    k1 = jnp.arange(p + 1)
    k2 = jnp.clip((room - (n - rank) * k1) // jnp.maximum(rank, 1), -1, p)

    def order(rows: Array, locked: Array) -> Array:
        steps = columns.obs_steps(gram, rows, jnp.asarray(p), locked)
        return jnp.argsort(-steps, stable=True)

    first, second = order(rest, jnp.zeros(p, bool)), order(inner, jnp.zeros(p, bool))
    curve = columns.error_curve(gram, rest, first) + columns.error_curve(gram, inner, second)[jnp.maximum(k2, 0)]
    k1 = jnp.argmin(jnp.where(k2 >= k1, curve, jnp.inf))
    free = columns.first_of(first, k1) & (room >= 0)
    return free, columns.first_of(order(inner, free), jnp.where(room >= 0, k2[k1], 0)) | free
