"""The forms a layer can take, under one contract: propose a structure that fits a budget, and say how to store it.

A form is one function `(Context) -> Candidate | None` and one row in `FORMS`. Selection looks at the Gram matrix only
(the paper's ADMM, which works on rows, is in `admm_form.py`); fitting and refinement are the same for all.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil, log2, sqrt

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from solvers import columns, spatial, two_level
from solvers.candidates import Candidate, Context
from solvers.extract import extract_spatial, extract_two_level
from solvers.factor_sizes import check_ranks, cost
from solvers.structure import column_structure, feature_structure
from solvers.tensor_forms import cp3_form, cp4_form, tucker2_form
from solvers.terms import index_bits

# Selection is dominated by LAPACK calls and products; compiling its many small loops costs more than they ever run.
_QUICK = {"xla_backend_optimization_level": 0}
_select_columns = jax.jit(lambda gram, w, k: columns.select(gram, w, k), compiler_options=_QUICK)
_select_two_level = jax.jit(two_level.select, static_argnames=("gauge", "options"), compiler_options=_QUICK)
_select_sum = jax.jit(two_level.select_sum, static_argnames=("gauge", "options"), compiler_options=_QUICK)
_select_spatial = jax.jit(spatial.select, static_argnames=("window", "gauge", "options"), compiler_options=_QUICK)

_column_structure = jax.jit(column_structure, compiler_options=_QUICK)
_spatial_structure = jax.jit(
    lambda gram, first, rank, kept, window, c_in: feature_structure(
        gram, *spatial.features(first, rank, kept, window, c_in)
    ),
    static_argnums=(4, 5),
    compiler_options=_QUICK,
)
_spatial_ranks = jax.jit(
    spatial.rank_grid, static_argnums=(0, 1, 2), static_argnames=("gauge", "fractions"), compiler_options=_QUICK
)

_SPATIAL_FRACTIONS = (0.4, 0.7, 0.85, 1.0)  # of the largest rank that the budget pays for


def two_level_candidate(
    context: Context, free: Array | np.ndarray, tail: Array | np.ndarray, rank: int, num_steps: int = 0
) -> Candidate:
    """Candidate with a on the columns `free` and u v on the columns `tail`."""
    structure = _column_structure(context.stats.gram, jnp.asarray(free), jnp.asarray(tail), rank)
    masks = np.asarray(free), np.asarray(tail)
    return Candidate(structure, lambda m: extract_two_level(m, *masks, rank, gauge=context.gauge), num_steps)


def largest_rank(budget: float, n: int, p: int, gauge: bool, pivot_cost: float = 0.0) -> int:
    """The largest r with r p + r (n - r) (gauge) or r p + r n (plain) stored values within the budget."""
    per_rank = n + p + pivot_cost
    if not gauge:
        return int(min(budget // (n + p), n, p))
    discriminant = per_rank * per_rank - 4 * budget
    root = per_rank / 2 if discriminant <= 0 else (per_rank - sqrt(discriminant)) / 2
    return int(max(0, min(root, n, p)))


def largest_count(budget: float, n: int, p: int, members: int = 1) -> int:
    """The most groups of `members` columns whose values and indices are within a budget of stored values."""
    total, limit = p // members, budget * (1 + 1e-10)  # a fraction of n p times n p is not exact

    def cost(groups: int) -> float:
        return n * groups * members + index_bits(groups * members, p) / 32

    # It rises but for the last step: all columns need no indices.
    return total if cost(total) <= limit else max(0, bisect_right(range(total), limit, key=cost) - 1)


def column_form(context: Context) -> Candidate | None:
    """Columns only: group OBS or forward selection with swaps; whole input channels with group="channel"."""
    n, p = context.shape.n, context.shape.p
    members = 1 if context.group == "column" else p // context.shape.c_in
    k = context.rounded(largest_count(context.budget, n, p, members), p // members)
    if k < 1:
        return None
    if members == 1:
        free = _select_columns(context.stats.gram, context.w, k)
    else:
        free = columns.select_groups(context.stats.gram, context.w, k, np.arange(p) % context.shape.c_in)
    return two_level_candidate(context, free, jnp.zeros(p, bool), 0)


def low_rank_form(context: Context) -> Candidate | None:
    """Data-aware low rank: reduced-rank regression on all columns."""
    n, p = context.shape.n, context.shape.p
    if context.ranks is None:
        rank = context.rounded(largest_rank(context.budget, n, p, context.gauge, context.pivot_cost), min(n, p))
    else:
        check_ranks("low_rank", context.shape, context.ranks)
        (rank,) = context.ranks
    if rank < 1:
        return None
    return two_level_candidate(context, jnp.zeros(p, bool), jnp.ones(p, bool), rank)


def _rank_grid(context: Context) -> list[int]:
    n = min(context.shape.n, context.shape.p)
    fractions = (1 / 4, 7 / 16, 5 / 8) if context.gauge else (1 / 8, 1 / 4, 3 / 8)
    return context.rounded_ranks((max(1, round(n * f)) for f in fractions), n)


def _two_level_budget(context: Context, rank: int) -> int:
    """What is left for values beside two sets of column indices and the pivots; 0 if not even one column fits."""
    left = int(context.budget - 2 * context.index_cost - rank * context.pivot_cost)
    return left if left >= context.shape.n else 0


def two_level_form(context: Context) -> Candidate | None:
    """a on S1, u v on S2 minus S1, by constraint ADMM on the Gram matrix; the best of a few ranks."""
    if context.group == "channel":
        return None
    options = two_level.options_for(context.shape.p)

    def select(rank: int, rounds: int) -> two_level.TwoLevel:
        budget = _two_level_budget(context, rank)
        more = {"gauge": context.gauge, "rounds": rounds, "options": options}
        return _select_two_level(context.stats, context.w, budget, rank, **more)

    short = {rank: select(rank, 1) for rank in _rank_grid(context) if _two_level_budget(context, rank)}
    if not short:
        return None
    rank = min(short, key=lambda rank: float(short[rank].error))
    best = short[rank] if options.rounds == 1 else select(rank, options.rounds)
    return _rounded_candidate(context, best, trim_tail=True)


def _rounded_candidate(context: Context, form: two_level.TwoLevel, *, trim_tail: bool) -> Candidate:
    """The candidate of a form, its numbers of columns rounded down to multiples of `round_to`.

    S1 gives its surplus to S2 minus S1, which drops its own if `trim_tail`; of the two, one may go altogether. The
    columns that move are those that are worth least in the fit on all kept columns.
    """
    free, tail, unit = np.array(form.free), np.array(form.tail), context.round_to
    if unit > 1:
        worth = columns.removal_costs(context.stats.gram, context.w, free | tail)
        if tail.any():
            moved = _least(free, worth, int(free.sum()) % unit)
            free, tail = free & ~moved, tail | moved
            if trim_tail and (free.any() or tail.sum() > unit):
                tail &= ~_least(tail, worth, int(tail.sum()) % unit)
        else:
            kept = int(free.sum())
            free &= ~_least(free, worth, kept - context.rounded(kept, len(free)))
    return two_level_candidate(context, free, tail, int(form.rank) if tail.any() else 0)


def _least(mask: np.ndarray, worth: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` columns of `mask` that are worth least."""
    chosen = np.zeros_like(mask)
    chosen[np.argsort(np.where(mask, worth, np.inf), kind="stable")[:count]] = True
    return chosen


def sum_form(context: Context) -> Candidate | None:
    """The paper's sum with v on every column outside S1, chosen on the Gram matrix."""
    ranks = np.asarray(_rank_grid(context), np.int32)
    budget = _two_level_budget(context, int(ranks.max()))
    if context.group == "channel" or not budget:
        return None
    found = _select_sum(context.stats, context.w, budget, ranks, gauge=context.gauge)
    return _rounded_candidate(context, found, trim_tail=False)


def spatial_form(context: Context) -> Candidate | None:
    """Spatial low rank + columns, for kernels with more than one row; the best of a few ranks."""
    n, p, window, c_in = context.shape.n, context.shape.p, context.shape.window, context.shape.c_in
    if context.ranks is None and (len(window) != 2 or window[0] < 2 or context.group == "channel"):
        return None
    options = spatial.SpatialOptions.for_size(n, p, window)
    if context.ranks is None:
        budget = int(context.budget - context.index_cost)
        pivot_cost = ceil(log2(window[1] * c_in)) / 32 if context.gauge else 0.0
        ranks = _spatial_ranks(n, p, window, budget, gauge=context.gauge, fractions=_SPATIAL_FRACTIONS)
        sizes = context.rounded_ranks((int(rank) for rank in np.asarray(ranks) if rank > 0), n * p)
        price = {"gauge": context.gauge, "pivot_cost": pivot_cost, "round_to": context.round_to}
    else:  # the pair alone: its plain cost leaves nothing for columns
        check_ranks("spatial", context.shape, context.ranks)
        budget, sizes, price = int(cost("spatial", context.shape, context.ranks)), list(context.ranks), {"gauge": False}
        options = replace(options, max_rank=max(*sizes, spatial.rank_bound(n, p, window)))
    select = partial(_select_spatial, **price, options=options)
    found = [select(context.stats, context.w, window, budget, np.int32(rank)) for rank in sizes]
    if not found:
        return None
    best = min(found, key=lambda form: float(form.error))
    structure = _spatial_structure(context.stats.gram, best.first, best.rank, best.columns, window, c_in)
    first, rank, mask = np.asarray(best.first), int(best.rank), np.asarray(best.columns)
    return Candidate(structure, lambda m: extract_spatial(m, first, rank, mask, window, c_in, gauge=context.gauge))


FORMS: dict[str, Callable[[Context], Candidate | None]] = {
    "columns": column_form,
    "low_rank": low_rank_form,
    "sum": sum_form,
    "two_level": two_level_form,
    "spatial": spatial_form,
    "tucker2": tucker2_form,
    "cp3": cp3_form,
    "cp4": cp4_form,
}
