"""A constant rate of parameters or multiply-adds."""

from dataclasses import dataclass
from math import isfinite

import numpy as np

from solvers.factor_sizes import largest_ranks, mode_tails
from solvers.rank_rules.base import COSTS, RankChoice
from solvers.rank_rules.problem import RankProblem


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A constant rate: the layer as it is, divided by it; exact for every form.

    Attributes:
        params: the rate of stored values, or
        macs: of multiply-adds.
    """

    params: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        if (self.params is None) == (self.macs is None):
            raise ValueError("params, macs: give the rate of one of them, for example Rate(params=2)")
        for name in COSTS:
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 1):
                raise ValueError(f"{name}: {value!r} is not a rate above 1; 2 halves the layer")

    @property
    def needs(self) -> str:
        """Weights only."""
        return "nothing"

    def choose(self, problem: RankProblem) -> RankChoice:
        """The largest ranks within the limit."""
        what = "params" if self.params is not None else "macs"
        limit = problem.current_cost(what) / (self.params or self.macs or 1.0)
        weights = problem.positions if what == "macs" else None
        tails = problem.tails if problem.form == "tucker2" else mode_tails(np.zeros((1, 1, 1)))
        found = largest_ranks(problem.form, problem.shape, limit, (tails[0], tails[1]), weights)
        if found is None:
            return RankChoice(None, f"even rank 1 takes more than {limit:,.0f} {what}: left as it is")
        return RankChoice(tuple(min(r, most) for r, most in zip(found, problem.largest, strict=True)))
