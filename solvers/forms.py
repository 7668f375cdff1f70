"""The forms a layer can take, under one contract: propose a structure that fits a budget, and say how to store it.

A form is one function `(Context) -> Candidate | None` and one row in `FORMS`. Selection looks at the Gram matrix only
(the paper's ADMM, which works on rows, is in `admm_form.py`); fitting and refinement are the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2, sqrt

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from solvers.extract import extract_spatial, extract_two_level

from solvers import columns, spatial, two_level
from solvers.gram import GramStatistics
from solvers.reconstruction import LayerProblem
from solvers.structure import Structure, column_structure, feature_structure
from solvers.terms import MatrixShape, Term

Extract = Callable[[np.ndarray], tuple[Term, ...]]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a form may look at.

    Attributes:
        stats: statistics of the calibration rows with ridge, outputs scaled by sqrt(weights).
        w: least-squares matrix for these statistics, (n, p).
        problem: the rows.
        shape: the layer as a matrix.
        budget: what may be stored, in values; an index counts its bits / 32.
        group: "column" or "channel".
        gauge: store factors with an identity block (fewer values for the same matrix).
    """

    stats: GramStatistics
    w: Float[Array, "n p"]
    problem: LayerProblem
    shape: MatrixShape
    budget: float
    group: str = "column"
    gauge: bool = True

    @property
    def index_cost(self) -> float:
        """Values' worth of one set of column indices at most (a bitmap)."""
        return self.shape.p / 32

    @property
    def pivot_cost(self) -> float:
        """Values' worth of one pivot index."""
        return ceil(log2(max(2, self.shape.n))) / 32 if self.gauge else 0.0


@dataclass(frozen=True)
class Candidate:
    """A proposed structure.

    Attributes:
        structure: what is kept; refit and refinement work on it.
        extract: a fitted matrix of this structure -> the terms that are stored.
        num_steps: iterations that selection took, where it counts them.
    """

    structure: Structure
    extract: Extract
    num_steps: int = 0


def two_level_candidate(context: Context, free: Array, tail: Array, rank: int, num_steps: int = 0) -> Candidate:
    """Candidate with a on the columns `free` and u v on the columns `tail`."""
    structure = column_structure(context.stats.gram, jnp.asarray(free), jnp.asarray(tail), rank)
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


def column_form(context: Context) -> Candidate | None:
    """Columns only: group OBS or forward selection with swaps; whole input channels with group="channel"."""
    n, p = context.shape.n, context.shape.p
    members = 1 if context.group == "column" else p // context.shape.c_in
    k = int((context.budget - context.index_cost) // (n * members))
    if k < 1:
        return None
    if members == 1:
        free = columns.select(context.stats.gram, context.w, k)
    else:
        free = columns.select_groups(context.stats.gram, context.w, k, np.arange(p) % context.shape.c_in)
    return two_level_candidate(context, free, jnp.zeros(p, bool), 0)


def low_rank_form(context: Context) -> Candidate | None:
    """Data-aware low rank: reduced-rank regression on all columns."""
    n, p = context.shape.n, context.shape.p
    rank = largest_rank(context.budget, n, p, context.gauge, context.pivot_cost)
    if rank < 1:
        return None
    return two_level_candidate(context, jnp.zeros(p, bool), jnp.ones(p, bool), rank)


def _rank_grid(context: Context) -> np.ndarray:
    n = context.shape.n
    fractions = (1 / 4, 7 / 16, 5 / 8) if context.gauge else (1 / 8, 1 / 4, 3 / 8)
    return np.unique([max(1, round(n * f)) for f in fractions]).astype(np.int32)


def two_level_form(context: Context) -> Candidate | None:
    """a on S1, u v on S2 minus S1, by constraint ADMM on the Gram matrix and by the greedy path."""
    if context.group == "channel":
        return None
    ranks = _rank_grid(context)
    budget = context.budget - 2 * context.index_cost - ranks.max() * context.pivot_cost
    if budget < context.shape.n:
        return None
    found = two_level.best(context.stats, context.w, budget, ranks, gauge=context.gauge)
    return two_level_candidate(context, found.free, found.tail, int(found.rank))


def sum_form(context: Context) -> Candidate | None:
    """The paper's sum with v on every column outside S1, chosen on the Gram matrix."""
    if context.group == "channel":
        return None
    ranks = _rank_grid(context)
    budget = context.budget - 2 * context.index_cost - ranks.max() * context.pivot_cost
    if budget < context.shape.n:
        return None
    found = two_level.select_sum(context.stats, context.w, budget, ranks, gauge=context.gauge)
    return two_level_candidate(context, found.free, found.tail, int(found.rank))


def spatial_form(context: Context) -> Candidate | None:
    """Spatial low rank + columns, for kernels with more than one row."""
    window, c_in = context.shape.window, context.shape.c_in
    if len(window) != 2 or window[0] < 2 or context.group == "channel":
        return None
    budget = context.budget - context.index_cost
    found = spatial.best(context.stats, context.w, window, budget, gauge=context.gauge)
    rows, kept = spatial.features(found.first, found.rank, found.columns, window, c_in)
    structure = feature_structure(context.stats.gram, rows, kept)
    first, rank, mask = np.asarray(found.first), int(found.rank), np.asarray(found.columns)
    return Candidate(structure, lambda m: extract_spatial(m, first, rank, mask, window, c_in, gauge=context.gauge))


FORMS: dict[str, Callable[[Context], Candidate | None]] = {
    "columns": column_form,
    "low_rank": low_rank_form,
    "sum": sum_form,
    "two_level": two_level_form,
    "spatial": spatial_form,
}
