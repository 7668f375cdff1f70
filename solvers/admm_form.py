"""The paper's form: support and rank from the penalised ADMM on the rows themselves, then the refit.

With a budget, a warm-started path of decreasing penalties is solved and its first point that would cost more than the
budget decides: columns are taken in the order of their norm there, and as much rank as that point has, cut to fit.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from solvers.activation import IDENTITY, RELU
from solvers.admm import path, solve
from solvers.admm_state import AdmmOptions, AdmmSolution, Status
from solvers.candidates import Candidate, Context
from solvers.forms import two_level_candidate
from solvers.m_step import MajorizeMinimize
from solvers.penalties import penalized_fractions
from solvers.prox import COLUMNS, Grouping, channels
from solvers.reconstruction import LayerProblem
from solvers.sharding import take_every

_penalties = jax.jit(penalized_fractions, static_argnums=3)
FRACTIONS = tuple(float(f) for f in np.geomspace(0.5, 0.01, 9))  # of both maxima: from nothing to nearly everything


def _grouping(context: Context) -> Grouping:
    return COLUMNS if context.group == "column" else channels(context.shape.c_in)


def _fewer_rows(problem: LayerProblem, rows_per_feature: int | None) -> LayerProblem:
    """Every so many-th row, so that about `rows_per_feature` p of them stay (4,096 at least)."""
    d, p = problem.x.shape
    wanted = d if rows_per_feature is None else min(d, max(rows_per_feature * p, 4096))
    stride = d // wanted  # rows are sorted by image; a stride keeps all of them in
    return take_every(problem, stride, wanted)


def _solvable(problem: LayerProblem, options: AdmmOptions) -> LayerProblem:
    """The problem, or its linear version where the M step cannot take the activation: only the support is used."""
    linear = problem.activation not in (RELU, IDENTITY) and isinstance(options.m_step, MajorizeMinimize)
    if not linear or problem.response is None:
        return problem
    return replace(problem, y=problem.response, activation=IDENTITY)


def _cost(context: Context, kept: int, rank: int) -> float:
    """Stored values of `kept` free columns and a rank-`rank` factor on the others, with their indices."""
    n, p = context.shape.n, context.shape.p
    u = n - rank if context.gauge else n
    return n * kept + rank * (p - kept + u) + 2 * context.index_cost + rank * context.pivot_cost


def _budget_terms(context: Context, members: int) -> tuple[Array, ...]:
    """What `_over_budget` needs, as traced values: other budgets do not compile anew."""
    sizes = (context.shape.n, context.shape.p, members)
    values = (*sizes, context.gauge, context.pivot_cost, context.budget - 2 * context.index_cost)
    return tuple(jnp.asarray(value, jnp.float32) for value in values)


def _over_budget(
    n: Array, p: Array, members: Array, gauge: Array, pivot_cost: Array, budget: Array, solution: AdmmSolution
) -> Array:
    """`_cost` above the budget, under jit."""
    kept = jnp.sum(solution.kept).astype(jnp.float32) * members
    rank = solution.rank.astype(jnp.float32)
    return n * kept + rank * (p - kept + n - gauge * rank + pivot_cost) > budget


def _largest_fit(context: Context, order: np.ndarray, rank: int, members: int) -> tuple[int, int]:
    """(kept groups, rank) within the budget: the rank lowered until at least as many columns as rank fit beside it."""
    unit = context.round_to
    for r in range(rank, -1, -1):
        room = context.budget - _cost(context, 0, r)
        groups = int(min(room // ((context.shape.n - r) * members), len(order))) if context.shape.n > r else 0
        if unit > 1 and groups < len(order):
            groups = groups // unit * unit if r else context.rounded(groups, len(order))
        if r % unit == 0 and (groups > 0 or (r == 0 and room >= 0)):
            return max(groups, 0), r
    return 0, 0


def _norms(solution: AdmmSolution, grouping: Grouping) -> np.ndarray:
    """Group norms of a, and below them (for ties at zero) those of the whole split, to order what a dropped."""
    inside, whole = grouping.norms(solution.sparse), grouping.norms(solution.split)
    return np.asarray(jnp.where(inside > 0, inside + jnp.max(whole), whole))


def admm_candidate(
    context: Context,
    options: AdmmOptions,
    rows_per_feature: int | None = 8,
    fractions: tuple[float, ...] = FRACTIONS,
) -> Candidate | None:
    """Support and rank of the paper's penalised problem for a budget; None if not one column fits."""
    grouping = _grouping(context)
    members = context.shape.p // grouping.count((context.shape.n, context.shape.p))
    assert context.problem is not None
    problem = _fewer_rows(_solvable(context.problem, options), rows_per_feature)
    values = jnp.asarray(fractions, problem.x.dtype)
    over_budget = Partial(_over_budget, *_budget_terms(context, members))
    solutions = path(problem, _penalties(problem, values, values, grouping), options=options, until=over_budget)
    kept = np.asarray(jnp.sum(solutions.kept, axis=-1)) * members
    ranks = np.asarray(solutions.rank)
    fine = np.asarray(solutions.status) != Status.DIVERGED
    over = [i for i in np.flatnonzero(fine) if _cost(context, int(kept[i]), int(ranks[i])) > context.budget]
    if not fine.any():
        return None
    point = over[0] if over else int(np.flatnonzero(fine)[-1])
    solution = jax.tree.map(lambda leaf: leaf[point], solutions)
    order = np.argsort(-_norms(solution, grouping), kind="stable")
    rank = min(int(ranks[max(point - 1, 0)] if over else ranks[point]), context.shape.n - 1)
    groups, rank = _largest_fit(context, order, rank, members)
    if groups + rank == 0:
        return None
    return _candidate(context, grouping, order[:groups], rank, int(np.sum(solutions.num_steps[: point + 1])))


def penalized_candidate(
    context: Context, fractions: tuple[float, float], options: AdmmOptions, start: Float[Array, "n p"] | None = None
) -> Candidate:
    """Support and rank of the paper's problem for given penalties, as fractions of their maxima, from a start."""
    grouping = _grouping(context)
    assert context.problem is not None
    problem = _solvable(context.problem, options)
    solution = solve(problem, _penalties(problem, *fractions, grouping), options=options, start=start)
    order = np.argsort(-_norms(solution, grouping), kind="stable")
    kept = context.rounded(int(np.sum(solution.kept)), len(order))
    rank = context.rounded(int(solution.rank), min(context.shape.n, context.shape.p))
    return _candidate(context, grouping, order[:kept], rank, int(solution.num_steps))


def _candidate(context: Context, grouping: Grouping, groups: np.ndarray, rank: int, num_steps: int) -> Candidate:
    shape = (context.shape.n, context.shape.p)
    chosen = np.zeros(grouping.count(shape), bool)
    chosen[groups] = True
    free = np.asarray(grouping.expand(jnp.asarray(chosen), shape))[0]
    tail = ~free if rank else np.zeros_like(free)
    # The rows are float32; the refit happens in the precision of the statistics.
    with jax.enable_x64(context.stats.gram.dtype == np.float64):
        return two_level_candidate(context, free, tail, rank, num_steps)
