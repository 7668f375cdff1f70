"""The contract of the forms that a layer can take: what they may look at, and what they propose."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, log2

import numpy as np
from jaxtyping import Array, Float

from solvers.gram import GramStatistics
from solvers.reconstruction import LayerProblem
from solvers.structure import Structure
from solvers.terms import MatrixShape, Term

Extract = Callable[[np.ndarray], tuple[Term, ...]]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a form may look at.

    Attributes:
        stats: statistics of the calibration rows with ridge, outputs scaled by sqrt(weights).
        w: least-squares matrix for these statistics, (n, p).
        shape: the layer as a matrix.
        problem: the rows, which only the ADMM looks at.
        budget: what may be stored, in values; an index counts its bits / 32.
        group: "column" or "channel".
        gauge: store factors with an identity block (fewer values for the same matrix).
        round_to: kept columns (groups) and ranks are multiples of it; see `rounded`.
        ranks: of the factored form that is asked for, in place of what the budget pays for.
    """

    stats: GramStatistics
    w: Float[Array, "n p"]
    shape: MatrixShape
    problem: LayerProblem | None = None
    budget: float = 0.0
    group: str = "column"
    gauge: bool = True
    round_to: int = 1
    ranks: tuple[int, ...] | None = None

    def rounded(self, size: int, most: int) -> int:
        """A number of columns or groups, or a rank, rounded down; as it is if it is all of them or below `round_to`."""
        return size if size >= most or size < self.round_to else size // self.round_to * self.round_to

    def rounded_ranks(self, ranks: Iterable[int], most: int) -> list[int]:
        """Candidates for a rank, rounded down; those below `round_to` only if all are."""
        found = {self.rounded(rank, most) for rank in ranks}
        return sorted({rank for rank in found if rank >= self.round_to} or found)

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
