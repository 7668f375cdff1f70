"""A constant loss of accuracy for each layer."""

from dataclasses import dataclass

from solvers.rank_rules.base import RankChoice
from solvers.rank_rules.problem import RankProblem
from solvers.rank_rules.search import bisected, smallest_ranks


@dataclass(frozen=True, kw_only=True)
class MaxDrop:
    """Each layer alone, without training, may cost the network so many points of accuracy.

    Attributes:
        points: percent of the labelled examples.
        by: "trial" bisects the ranks with the network itself; "error" tries one size, takes the loss of accuracy to be
            proportional to the squared error of the layer's response, and searches that.
    """

    points: float = 1.0
    by: str = "trial"

    def __post_init__(self) -> None:
        if not 0 <= self.points <= 100:
            raise ValueError(f"points: {self.points!r} is not in [0, 100]")
        if self.by not in ("trial", "error"):
            raise ValueError(f"by: {self.by!r} is unknown; choose trial or error")

    @property
    def needs(self) -> str:
        """The network and labels."""
        return "accuracy"

    def choose(self, problem: RankProblem) -> RankChoice:
        """The smallest ranks along `family` (by trial), or within the error that is allowed."""
        if self.by == "trial":
            return bisected(problem, lambda ranks: problem.drop(ranks) <= self.points)
        tolerance, ranks = 0.05, problem.largest
        for _ in range(3):  # until the loss can be told from nothing
            ranks = smallest_ranks(problem, tolerance).ranks or ranks
            error, drop = problem.error(ranks), problem.drop(ranks)
            if drop > max(self.points, 0.2):
                break
            tolerance *= 4
        allowed = error * self.points / drop if drop > 0 else error
        return smallest_ranks(problem, allowed)
