"""As many components as variational Bayes takes for signal (Kim et al. 2016; Gusak et al. 2019)."""

from dataclasses import dataclass
from math import isfinite

import numpy as np

from solvers.rank_rules.base import RankChoice
from solvers.rank_rules.problem import RankProblem
from solvers.vbmf import Posterior, evbmf, vbmf


@dataclass(frozen=True, kw_only=True)
class _Bayes:
    """Common to both: the number of components of each core matrix, weakened.

    Attributes:
        weakening: 1 takes the ranks found, 0.8 goes four fifths of the way from the present ranks to them.
        noise: variance of an entry's noise; None: estimated for each matrix.
        least: smallest rank; layers that have no more stay as they are.
    """

    weakening: float = 0.8
    noise: float | None = None
    least: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.weakening <= 1:
            raise ValueError(f"weakening: {self.weakening!r} is not in (0, 1]; 1 takes the ranks as they are found")
        if self.least < 1:
            raise ValueError(f"least: {self.least!r}; give at least 1")

    @property
    def needs(self) -> str:
        """Weights only."""
        return "nothing"

    def _analyse(self, matrix: np.ndarray) -> Posterior:
        raise NotImplementedError

    def choose(self, problem: RankProblem) -> RankChoice:
        """r = R - weakening (R - found), R the present rank; CP takes the largest of its modes' ranks."""
        name = type(self).__name__
        found = [self._analyse(core).rank for core in problem.cores]
        if min(found) == 0:
            return RankChoice(None, f"{name} takes all of it for noise (ranks {tuple(found)}): left as it is")
        if problem.form.startswith("cp"):
            found = [min(max(found), problem.largest[0])]
        ranks = tuple(
            most if most <= self.least else max(self.least, int(most - self.weakening * (most - r)))
            for r, most in zip(found, problem.largest, strict=True)
        )
        full = all(r >= most for r, most in zip(found, problem.largest, strict=True))
        return RankChoice(ranks, f"{name} finds full rank" if full else "")


@dataclass(frozen=True, kw_only=True)
class Evbmf(_Bayes):
    """Empirical variational Bayes: the global analytic solution (`solvers.vbmf.evbmf`)."""

    def _analyse(self, matrix: np.ndarray) -> Posterior:
        return evbmf(matrix, self.noise)


@dataclass(frozen=True, kw_only=True)
class Vbmf(_Bayes):
    """Variational Bayes with a fixed prior (`solvers.vbmf.vbmf`): a wide prior keeps nearly everything.

    Attributes:
        prior: the product ca cb, in units of the mean square of the weights.
    """

    prior: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isfinite(self.prior) and self.prior > 0):
            raise ValueError(f"prior: {self.prior!r} is not a positive number")

    def _analyse(self, matrix: np.ndarray) -> Posterior:
        scale = float(np.mean(matrix**2))
        return vbmf(matrix, self.prior * (scale or 1.0), self.noise)
