"""The smallest ranks that are good enough."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from solvers.factor_sizes import Ranks
from solvers.rank_rules.base import RankChoice
from solvers.rank_rules.problem import RankProblem


def smallest_ranks(problem: RankProblem, tolerance: float) -> RankChoice:
    """The cheapest ranks at which the relative squared error stays within the tolerance."""
    if problem.form.startswith("cp"):
        return bisected(problem, lambda ranks: problem.error(ranks) <= tolerance)
    tails = problem.tails
    if problem.form != "tucker2":
        return RankChoice((min(int(np.argmax(tails[0] <= tolerance)) or 1, problem.largest[0]),))
    outputs, inputs = (np.arange(1, len(t)) for t in tails)
    lost = tails[0][1:, None] + tails[1][None, 1:]
    places = problem.shape.p // problem.shape.c_in
    price = inputs * problem.shape.c_in + np.outer(outputs, inputs) * places + outputs[:, None] * problem.shape.n
    best = np.unravel_index(np.argmin(np.where(lost <= tolerance, price, np.inf)), lost.shape)
    ranks = int(outputs[best[0]]), int(inputs[best[1]])
    return RankChoice(tuple(min(r, most) for r, most in zip(ranks, problem.largest, strict=True)))


def family(problem: RankProblem) -> list[Ranks]:
    """Ranks from 1 to the present ones along one line, each larger than the one before; a layer's sizes to search."""
    largest = problem.largest
    found = [tuple(max(1, round(m * t)) for m in largest) for t in np.linspace(0, 1, max(largest) + 1)[1:]]
    return [found[0], *(b for a, b in pairwise(found) if b != a)]


def bisected(problem: RankProblem, good: Callable[[Ranks], bool]) -> RankChoice:
    """The smallest member of the family that is good; `good` is taken to stay true from there on."""
    line = family(problem)
    low, high = 0, len(line) - 1  # the last one loses nothing that the layer does not lose already
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(line[middle]) else (middle + 1, high)
    return RankChoice(line[high])
