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
        least: smallest rank; modes that have no more keep what they have. None: 8 for Tucker-2 and dense layers, 2
            for the others, as MUSCO has it.
    """

    weakening: float = 0.8
    noise: float | None = None
    least: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weakening <= 1:
            raise ValueError(f"weakening: {self.weakening!r} is not in (0, 1]; 1 takes the ranks as they are found")
        if self.least is not None and self.least < 1:
            raise ValueError(f"least: {self.least!r}; give at least 1")

    @property
    def needs(self) -> str:
        """Weights only."""
        return "nothing"

    def _analyse(self, matrix: np.ndarray) -> Posterior:
        raise NotImplementedError

    def choose(self, problem: RankProblem) -> RankChoice:
        """r = R - weakening (R - found), R the present rank; CP takes the largest of its modes' ranks.

        Where nothing is found the rank stays; where nothing is found at all the layer does.
        """
        name, largest = type(self).__name__, problem.largest
        found = tuple(self._analyse(core).rank for core in problem.cores)
        if max(found) == 0:
            return RankChoice(None, f"{name} takes all of it for noise (ranks {found}): left as it is")
        note = f"{name} finds ranks {found}: where it finds none, the rank stays" if min(found) == 0 else ""
        if problem.form.startswith("cp"):
            found = (min(max(found), largest[0]),)
        if all(r >= most for r, most in zip(found, largest, strict=True)):
            note = f"{name} finds full rank"
        least = self._least(problem)
        ranks = (
            most if most <= least or r == 0 else max(least, int(most - self.weakening * (most - r)))
            for r, most in zip(found, largest, strict=True)
        )
        return RankChoice(tuple(ranks), note)

    def _least(self, problem: RankProblem) -> int:
        if self.least is not None:
            return self.least
        return 8 if problem.form == "tucker2" or not problem.shape.window else 2


@dataclass(frozen=True, kw_only=True)
class Evbmf(_Bayes):
    """Empirical variational Bayes: the global analytic solution (`solvers.vbmf.evbmf`)."""

    def _analyse(self, matrix: np.ndarray) -> Posterior:
        return evbmf(matrix, self.noise)


@dataclass(frozen=True, kw_only=True)
class Vbmf(_Bayes):
    """Variational Bayes with a fixed prior (`solvers.vbmf.vbmf`): a wide prior keeps nearly everything.

    Attributes:
        prior: the product ca cb, in units of the root mean square of the weights: the ranks do not depend on
            their scale.
    """

    prior: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isfinite(self.prior) and self.prior > 0):
            raise ValueError(f"prior: {self.prior!r} is not a positive number")

    def _analyse(self, matrix: np.ndarray) -> Posterior:
        scale = float(np.sqrt(np.mean(matrix**2)))
        return vbmf(matrix, self.prior * (scale or 1.0), self.noise)
