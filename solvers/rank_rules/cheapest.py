"""LC's automatic rank."""

from dataclasses import dataclass
from math import isfinite

import jax
import jax.numpy as jnp
import numpy as np

from solvers.compressions import RankSelection
from solvers.factor_sizes import Ranks, full_ranks, mode_tails
from solvers.rank_rules.base import COSTS, RankChoice
from solvers.rank_rules.problem import RankProblem


@dataclass(frozen=True, kw_only=True)
class Cheapest:
    """LC's automatic rank: min over the ranks of alpha * cost + 1/2 * relative squared error of the weights.

    Idelbayev & Carreira-Perpinan (2020), eq. 8, with weights of norm 1. For Tucker-2 the error is the higher-order
    SVD's bound. CP has no such formula.

    Attributes:
        alpha: price of a stored value, or of a multiply-add.
        what: "params" or "macs".
    """

    alpha: float
    what: str = "params"

    def __post_init__(self) -> None:
        if not (isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha: {self.alpha!r} is not a price; give a number >= 0")
        if self.what not in COSTS:
            raise ValueError(f"what: {self.what!r} is unknown; choose params or macs")

    @property
    def needs(self) -> str:
        """Weights only."""
        return "nothing"

    def choose(self, problem: RankProblem) -> RankChoice:
        """The exact minimiser."""
        if problem.form.startswith("cp"):
            raise ValueError(f"rank_rule: LC's rank selection has no formula for {problem.form}; use another rule")
        ranks = self._grid(problem) if problem.form == "tucker2" else self._pair(problem)
        if min(ranks) == 0:
            return RankChoice(None, "the price is above what any rank is worth (rank 0): left as it is")
        if problem.form != "tucker2" and ranks == full_ranks(problem.form, problem.shape):
            return RankChoice(None, "no rank is cheaper than the dense layer: left as it is")
        return RankChoice(tuple(min(r, most) for r, most in zip(ranks, problem.largest, strict=True)))

    def _pair(self, problem: RankProblem) -> Ranks:
        is_spatial = problem.form == "spatial"
        per_value = problem.cost((1,), self.what) / problem.cost((1,), "params")
        rule = RankSelection(
            self.alpha,
            cost=per_value,
            scheme="spatial" if is_spatial else "rows",
            window=problem.shape.window if is_spatial else (),
        )
        weights = np.asarray(problem.weights, np.float64)
        with jax.enable_x64(True):
            return (int(rule.compress(jnp.asarray(weights / (np.linalg.norm(weights) or 1.0)), 1.0).rank),)

    def _grid(self, problem: RankProblem) -> Ranks:
        n, c = full_ranks("tucker2", problem.shape)
        plain = mode_tails(np.asarray(problem.weights, np.float64).reshape(n, -1, c))
        lost = (plain[0][:, None] + plain[1][None, :]) / (plain[0][0] or 1.0)
        outputs, inputs = np.meshgrid(np.arange(n + 1), np.arange(c + 1), indexing="ij")
        places = problem.shape.p // c
        weights = problem.positions if self.what == "macs" else (1.0, 1.0, 1.0)
        price = weights[0] * c * inputs + weights[1] * places * outputs * inputs + weights[2] * n * outputs
        value = self.alpha * np.where(outputs * inputs > 0, price, 0) + 0.5 * np.where(outputs * inputs > 0, lost, 1)
        best = np.unravel_index(np.argmin(value), value.shape)
        return (0, 0) if value[best] >= 0.5 else (int(best[0]), int(best[1]))
