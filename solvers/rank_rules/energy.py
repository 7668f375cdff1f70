"""A share of the energy is kept."""

from dataclasses import dataclass

from solvers.rank_rules.base import RankChoice
from solvers.rank_rules.problem import RankProblem
from solvers.rank_rules.search import smallest_ranks


@dataclass(frozen=True, kw_only=True)
class Energy:
    """A share of the energy is kept.

    Attributes:
        kept: the share, in (0, 1).
        of: "response" (the layer's output on the data) or "weights".
    """

    kept: float = 0.9
    of: str = "response"

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise ValueError(f"kept: {self.kept!r} is not a share in (0, 1)")
        if self.of not in ("response", "weights"):
            raise ValueError(f"of: {self.of!r} is unknown; choose response or weights")

    @property
    def needs(self) -> str:
        """The response, if that is what counts."""
        return "response" if self.of == "response" else "nothing"

    def choose(self, problem: RankProblem) -> RankChoice:
        """The cheapest ranks that lose at most the rest, by the bound of the higher-order SVD; CP by fitting it."""
        if self.needs == "nothing" and problem.form.startswith("cp"):
            raise ValueError(f"of: the spectrum of the weights does not bound {problem.form}; use of='response'")
        return smallest_ranks(problem, 1 - self.kept)
