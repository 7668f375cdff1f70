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

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Num

from solvers import columns
from solvers.gram import GramStatistics
from solvers.two_level_steps import (
    TwoLevelOptions,
    TwoLevelProblem,
    admm,
    basis_cost,
    closed_form,
    exchange,
    greedy_path,
    leading,
    prepare,
)

DEFAULT = TwoLevelOptions()
SMALL = TwoLevelOptions(rounds=4, finalists=4)
LARGE = TwoLevelOptions(
    rounds=1,
    growth=(1.3, 1.2, 1.1),
    max_steps=30,
    polish=1,
    greedy=False,
    pure_columns=False,
    finalists=1,
    screen_steps=12,
    screen_growth=(1.8, 1.6, 1.4),
)


def options_for(p: int) -> TwoLevelOptions:
    """The schedule for a layer of p columns: more tries up to 400, `LARGE` beyond 1,500, where a step is costly."""
    if p <= 400:
        return SMALL
    return DEFAULT if p <= 1500 else LARGE


def rank_grid(n: int, p: int, *, gauge: bool = True) -> Int[np.ndarray, " ranks"]:
    """Ranks worth trying for an (n, p) matrix: sixteenths of min(n, p), lower ones without the gauge.

    Where p > 1,500 there are two of them only.
    """
    if p > 1500:
        parts = (6, 10) if gauge else (4, 6)
    else:
        parts = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12) if gauge else (1, 2, 3, 4, 5, 6, 8)
    return np.unique([max(1, min(n, p) * i // 16) for i in parts])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TwoLevel:
    """What a two-level form keeps; leading axes only in batches. `structure.column_structure` makes a fit of it.

    Attributes:
        free: S1, (p,).
        tail: S2 minus S1, (p,).
        rank: r; 0 exactly when `tail` is empty.
        error: relative linear error after the refit, as `gram.linear_error` measures it.
    """

    free: Bool[Array, "*batch p"]
    tail: Bool[Array, "*batch p"]
    rank: Int[Array, "*batch"]
    error: Float[Array, "*batch"]


def cost(
    free: Bool[Array, " p"],
    tail: Bool[Array, " p"],
    rank: Int[ArrayLike, ""],
    n: int,
    *,
    gauge: Bool[ArrayLike, ""] = True,
) -> Int[Array, ""]:
    """Stored values of a two-level form: n k1 + r (k2 - k1) + r (n - r), or + r n without the gauge."""
    rank = jnp.asarray(rank).astype(int)
    return n * jnp.sum(free) + rank * jnp.sum(tail) + basis_cost(rank, n, gauge)


def _form(problem: TwoLevelProblem, masks: tuple[Array, Array], rank: Array, lost: Array) -> TwoLevel:
    free, both = masks
    tail = both & ~free & (rank > 0)
    return TwoLevel(
        free=free,
        tail=tail,
        rank=jnp.where(jnp.any(tail), rank, 0).astype(jnp.int32),
        error=(problem.rest + lost) / problem.scale,
    )


def _better(new: TwoLevel, old: TwoLevel) -> TwoLevel:
    return jax.tree.map(lambda a, b: jnp.where(new.error < old.error, a, b), new, old)


def _nothing(problem: TwoLevelProblem) -> TwoLevel:
    none = jnp.zeros(problem.gram.shape[0], bool)
    lost = jnp.sum(problem.cross * problem.w)
    return _form(problem, (none, none), jnp.zeros((), int), lost)


def _rounds(
    problem: TwoLevelProblem,
    budget: Array,
    rank: Array,
    options: TwoLevelOptions,
    choose: Callable[[Array, Array, Array], tuple[Array, Array]],
    start: Array,
    rounds: ArrayLike | None = None,
) -> TwoLevel:
    """`choose(u, rank, room)` -> (S1, S2), the best U for them, exchanges, and again; the best form met."""
    room = budget - basis_cost(rank, problem.n, problem.gauge)

    def polish(i: Array, s: tuple) -> tuple:
        (free, both), _, best = s
        masks = free, both
        u, lost = closed_form(problem, free, both, rank)
        best = _better(_form(problem, masks, rank, lost), best)
        more = lambda old: exchange(problem, u, rank, room, old, options.max_exchanges)  # noqa: E731
        return lax.cond(i < options.polish, more, lambda old: old, masks), u, best

    def one(_: Array, s: tuple[Array, TwoLevel]) -> tuple[Array, TwoLevel]:
        u, best = s
        return lax.fori_loop(0, options.polish + 1, polish, (choose(u, rank, room), u, best))[1:]

    nothing = _nothing(problem)
    best = lax.fori_loop(0, options.rounds if rounds is None else rounds, one, (start, nothing))[1]
    # Without room for U there is no form of this rank.
    return jax.tree.map(lambda a, b: jnp.where(room >= 0, a, b), best, nothing)


def _clip_rank(problem: TwoLevelProblem, rank: ArrayLike) -> Array:
    return jnp.clip(jnp.asarray(rank).astype(int), 0, problem.w.shape[0])


def _by_admm(
    problem: TwoLevelProblem, budget: Array, rank: Array, options: TwoLevelOptions, rounds: ArrayLike | None = None
) -> TwoLevel:
    start = leading(problem.cross @ problem.w.T, rank)[0]
    return _rounds(problem, budget, rank, options, partial(admm, problem, options=options), start, rounds)


def _by_greedy(problem: TwoLevelProblem, budget: Array, rank: Array, options: TwoLevelOptions) -> TwoLevel:
    start = leading(problem.cross @ problem.w.T, rank)[0]
    return _rounds(problem, budget, rank, options, partial(greedy_path, problem), start)


def _pure_columns(problem: TwoLevelProblem, budget: Array) -> TwoLevel:
    free = columns.select(problem.gram, problem.w, budget // problem.n)
    lost = columns.column_error(problem.gram, problem.w, free)
    return _form(problem, (free, free), jnp.zeros((), int), lost)


def _pure_low_rank(problem: TwoLevelProblem, budget: Array) -> TwoLevel:
    """u v on all columns, of the largest rank that the budget pays for."""
    p = problem.gram.shape[0]
    ranks = jnp.arange(problem.w.shape[0] + 1)
    rank = jnp.max(jnp.where(ranks * p + basis_cost(ranks, problem.n, problem.gauge) <= budget, ranks, 0))
    lost = leading(problem.cross @ problem.w.T, rank)[1]
    return _form(problem, (jnp.zeros(p, bool), jnp.ones(p, bool)), rank, lost)


def _least(forms: TwoLevel) -> TwoLevel:
    """The form of least error of a batch."""
    i = jnp.argmin(forms.error)
    return jax.tree.map(lambda leaf: leaf[i], forms)


def _checked(stats: GramStatistics, w: Array, options: TwoLevelOptions | None) -> TwoLevelOptions:
    if w.shape != stats.cross.shape:
        raise ValueError(
            f"w has the shape {w.shape}, but the statistics are of a layer of shape {stats.cross.shape}; "
            "take w = gram.least_squares(stats)."
        )
    return options_for(w.shape[1]) if options is None else options


@partial(jax.jit, static_argnames="options")
def select(
    stats: GramStatistics,
    w: Float[Array, "n p"],
    budget: Num[ArrayLike, ""],
    rank: Int[ArrayLike, ""],
    *,
    gauge: Bool[ArrayLike, ""] = True,
    rounds: Int[ArrayLike, ""] | None = None,
    options: TwoLevelOptions | None = None,
) -> TwoLevel:
    """A two-level form of a given rank with a low F, by constraint ADMM and exchanges.

    Args:
        stats: statistics of the layer; gram with a ridge where it is nearly singular.
        w: (n, p), the matrix to approximate, `gram.least_squares(stats)`.
        budget: stored values the form may have, traced; `cost` never exceeds it.
        rank: r, traced; beyond [0, min(n, p)] it counts as the nearer end. 0 gives pure columns.
        gauge: whether u is stored with an identity block, traced.
        rounds: in place of the schedule's, traced: one is enough to compare ranks.
        options: schedule; None takes `options_for(p)`.

    Returns:
        What to keep. When the budget does not even pay for u: nothing at all, with rank 0.

    Raises:
        ValueError: w and stats are of different shapes.
    """
    options = _checked(stats, w, options)
    problem = prepare(stats, w, gauge)
    return _by_admm(problem, jnp.asarray(budget).astype(int), _clip_rank(problem, rank), options, rounds)


@partial(jax.jit, static_argnames="options")
def select_greedy(
    stats: GramStatistics,
    w: Float[Array, "n p"],
    budget: Num[ArrayLike, ""],
    rank: Int[ArrayLike, ""],
    *,
    gauge: Bool[ArrayLike, ""] = True,
    options: TwoLevelOptions | None = None,
) -> TwoLevel:
    """As `select`, with three group OBS paths in place of ADMM for every U."""
    options = _checked(stats, w, options)
    problem = prepare(stats, w, gauge, spectrum=False)
    return _by_greedy(problem, jnp.asarray(budget).astype(int), _clip_rank(problem, rank), options)


@partial(jax.jit, static_argnames="options")
def best(
    stats: GramStatistics,
    w: Float[Array, "n p"],
    budget: Num[ArrayLike, ""],
    ranks: Int[ArrayLike, " ranks"],
    *,
    gauge: Bool[ArrayLike, ""] = True,
    options: TwoLevelOptions | None = None,
) -> TwoLevel:
    """The form of least F over several ranks, pure low rank and (`options.pure_columns`) pure columns included.

    One short round of ADMM compares the ranks; the `options.finalists` best are solved in full by ADMM and, if
    `options.greedy`, the best of them by the greedy path too.

    Args:
        stats: as in `select`.
        w: as in `select`.
        budget: as in `select`.
        ranks: (ranks,), the ranks to try, traced (`rank_grid`).
        gauge: as in `select`.
        options: schedule; None takes `options_for(p)`.

    Returns:
        What to keep.

    Raises:
        ValueError: w and stats are of different shapes.
    """
    options = _checked(stats, w, options)
    problem = prepare(stats, w, gauge)
    budget, ranks = jnp.asarray(budget).astype(int), _clip_rank(problem, ranks)
    short = replace(options, rounds=1, polish=0, growth=options.screen_growth, max_steps=options.screen_steps)
    finalists = min(options.finalists, len(ranks))
    if finalists < len(ranks):
        errors = lax.map(lambda rank: _by_admm(problem, budget, rank, short).error, ranks)
        ranks = ranks[jnp.argsort(errors)[:finalists]]
    forms = lax.map(lambda rank: _by_admm(problem, budget, rank, options), ranks)
    form = _better(_least(forms), _pure_low_rank(problem, budget))
    if options.pure_columns:
        form = _better(_pure_columns(problem, budget), form)
    if options.greedy:
        form = _better(_by_greedy(problem, budget, ranks[jnp.argmin(forms.error)], options), form)
    return form


@partial(jax.jit, static_argnames="options")
def select_sum(
    stats: GramStatistics,
    w: Float[Array, "n p"],
    budget: Num[ArrayLike, ""],
    ranks: Int[ArrayLike, " ranks"],
    *,
    gauge: Bool[ArrayLike, ""] = True,
    options: TwoLevelOptions | None = None,
) -> TwoLevel:
    """The sum a + b of the paper: a on k columns, v on all the others (S2 = all), the best over `ranks`.

    For each rank, k is what the budget leaves; columns by group OBS and swaps on (I - UU')w, then the best U, in
    `options.rounds` turns, once from U = 0 (columns first) and once from the leading vectors (low rank first).

    Arguments, result and errors as in `best`. Where a rank cannot be paid the error is that of keeping nothing.
    """
    options = _checked(stats, w, options)
    problem = prepare(stats, w, gauge, spectrum=False)
    p = w.shape[1]
    plain = replace(options, polish=0)

    def choose(u: Array, rank: Array, room: Array) -> tuple[Array, Array]:
        room = room - rank * p
        k = jnp.clip(room // jnp.maximum(problem.n - rank, 1), 0, p)
        rest = problem.w - u @ (u.T @ problem.w)
        free = columns.obs_steps(problem.gram, rest, p - k, jnp.zeros(p, bool)) == p
        free = columns.swap(problem.gram, rest, free)
        return free & (room >= 0), jnp.broadcast_to(room >= 0, (p,))

    def one(rank: Array) -> TwoLevel:
        u = leading(problem.cross @ problem.w.T, rank)[0]
        starts = jnp.stack([jnp.zeros_like(u), u])
        turns = lambda u: _rounds(problem, jnp.asarray(budget).astype(int), rank, plain, choose, u)  # noqa: E731
        return _least(lax.map(turns, starts))

    return _least(lax.map(one, _clip_rank(problem, ranks)))
