"""Exact k-means on a line by dynamic programming, vectorised over whole levels of its divide and conquer.

The best first k clusters of the first j values take O(d log d) each from those of k - 1 clusters (Wu, 1991). Bounds
from a coarse grid first rule out, by proof, most places where a cluster can end: 10^6 values and 16 clusters take a
second in place of ten.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_GRID = 2048
_SLACK = 1e-9  # relative: bounds are sums in float64


class _Window(NamedTuple):
    """Where a cluster may end: low <= j <= high."""

    low: int
    high: int


class _Costs:
    """Squared error of the increasing values i ... j - 1 around their mean, each as often as its mass says."""

    def __init__(self, values: Float[np.ndarray, " d"], masses: Float[np.ndarray, " d"]):
        centred = values - np.average(values, weights=masses)
        self.mass, self.first, self.second = (
            np.concatenate([[0.0], np.cumsum(terms)]) for terms in (masses, masses * centred, masses * centred**2)
        )

    def of(self, i: np.ndarray | int, j: np.ndarray | int) -> np.ndarray:
        """Of i ... j - 1, i <= j."""
        mass, step = self.mass[j] - self.mass[i], self.first[j] - self.first[i]
        return np.maximum(self.second[j] - self.second[i] - step * step / np.where(mass > 0, mass, 1), 0)

    def best_from(self, before: np.ndarray, i: np.ndarray, j: np.ndarray | int) -> np.ndarray:
        """before + cost(i, j) for i < j, but for what depends on j alone."""
        step = self.first[j] - self.first[i]
        return before - self.second[i] - step * step / (self.mass[j] - self.mass[i])


def _layer(costs: _Costs, before: np.ndarray, sources: _Window, ends: _Window) -> tuple[np.ndarray, np.ndarray]:
    """best[j] = min over i of before[i] + cost(i, j), and the i, for the j in `ends` and the i in `sources`.

    Both arrays begin at their window's `low`. The best i never falls with j, so the middle j of a range halves the
    search for the others. All ranges of one depth are searched at once.
    """
    best, split = np.full(ends.high - ends.low + 1, np.inf), np.zeros(ends.high - ends.low + 1, np.int64)
    low, high = np.array([max(ends.low, sources.low + 1)]), np.array([ends.high + 1])  # the j that each range holds
    left, right = np.array([sources.low]), np.array([sources.high])  # the i that may be best for them
    while len(low):
        middle = (low + high) // 2
        counts = np.minimum(right, middle - 1) + 1 - left
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        i = np.arange(counts.sum()) + np.repeat(left - starts, counts)
        value = costs.best_from(before[i - sources.low], i, np.repeat(middle, counts))
        least = np.minimum.reduceat(value, starts)
        hits = np.flatnonzero(value == np.repeat(least, counts))
        at = hits[np.searchsorted(hits, starts)]  # the first of equals
        best[middle - ends.low], split[middle - ends.low] = least + costs.second[middle], i[at]
        low, high = np.concatenate([low, middle + 1]), np.concatenate([middle, high])
        left, right = np.concatenate([left, i[at]]), np.concatenate([i[at], right])
        live = low < high
        low, high, left, right = low[live], high[live], left[live], right[live]
    return best, split


def _feasible(costs: _Costs, k: int, grid: Int[np.ndarray, " g"], table: Float[np.ndarray, "g g"]) -> float:
    """An upper bound: the error of the best clusters that end on the grid, improved by Lloyd's steps."""
    best, splits = table[0], []
    for _ in range(1, k):
        sums = best[:, None] + table
        splits.append(np.argmin(sums, axis=0))
        best = np.min(sums, axis=0)
    ends = [len(grid) - 1]
    for split in reversed(splits):
        ends.append(int(split[ends[-1]]))
    edges = grid[[0, *reversed(ends)]]
    error = np.inf
    for _ in range(100):
        found = float(np.sum(costs.of(edges[:-1], edges[1:])))
        if found >= error:
            break
        error, edges = found, _lloyd(costs, edges)
    return error


def _lloyd(costs: _Costs, edges: Int[np.ndarray, " k1"]) -> Int[np.ndarray, " k1"]:
    """Ends of the clusters nearest to the means of these clusters."""
    mass = np.diff(costs.mass[edges])
    means = np.diff(costs.first[edges])[mass > 0] / mass[mass > 0]
    values = np.diff(costs.first) / np.diff(costs.mass)
    inner = np.searchsorted(values, (means[1:] + means[:-1]) / 2)
    return np.concatenate([edges[:1], inner, np.full(len(edges) - 1 - len(inner), edges[-1])])


def _windows(costs: _Costs, k: int) -> list[_Window]:
    """For each number of clusters m = 1 ... k - 1, where the m-th may end in an optimum.

    Let the m-th cluster end in a cell of a grid. What is left of the cell costs no less with its values removed, and
    neither does what is right of it: if bounds on both add up to more than a feasible error, the cell is ruled out.
    """
    d = len(costs.mass) - 1
    grid = _grid(costs)
    table = costs.of(*np.broadcast_arrays(grid[:, None], grid[None, :]))
    table[np.tril_indices(len(grid), -1)] = np.inf
    limit = _feasible(costs, k, grid, table) * (1 + _SLACK) + _SLACK * costs.second[-1]
    between = table[1:, :-1].copy()  # a cluster that begins in one cell and ends in another, both removed
    np.fill_diagonal(between, 0)
    left, right = [table[0, :-1]], [table[1:, -1]]
    for _ in range(1, k - 1):
        left.append(np.min(left[-1][:, None] + between, axis=0))
        right.append(np.min(between + right[-1][None, :], axis=1))
    windows = []
    for m, (before, after) in enumerate(zip(left, reversed(right), strict=True), 1):
        cells = np.flatnonzero(before + after <= limit)
        windows.append(_Window(max(int(grid[cells[0]]), m), min(int(grid[cells[-1] + 1]), d - k + m)))
    return windows


def _grid(costs: _Costs) -> Int[np.ndarray, " g"]:
    """Half of the points with as many values between any two, half as far from each other: tails need the latter."""
    d = len(costs.mass) - 1
    values = np.diff(costs.first) / np.diff(costs.mass)
    far = np.searchsorted(values, np.linspace(values[0], values[-1], _GRID // 2))
    return np.unique(np.concatenate([np.linspace(0, d, _GRID // 2).astype(np.int64), far]))


def _grouped(
    values: Float[np.ndarray, " d"], weights: Float[np.ndarray, " d"] | None
) -> tuple[Float[np.ndarray, " distinct"], Float[np.ndarray, " distinct"]]:
    """The distinct values whose weight counts, increasing, and what they weigh."""
    if weights is None:
        distinct, counts = np.unique(values, return_counts=True)
        return distinct.astype(np.float64), counts.astype(np.float64)
    distinct, place = np.unique(values, return_inverse=True)
    masses = np.bincount(place, weights, len(distinct))
    heavy = masses > np.finfo(np.float64).eps * masses.sum()  # others are lost in sums over all values
    return distinct[heavy].astype(np.float64), masses[heavy]


def optimal_centers(
    values: Float[np.ndarray, " d"], k: int, weights: Float[np.ndarray, " d"] | None = None
) -> Float[np.ndarray, " k"]:
    """Increasing centers of least squared error; equal ones where there are fewer distinct values than k.

    Args:
        values: in any order.
        k: how many centers, at most d.
        weights: what the squared error of each value counts, none negative and not all zero; None: all alike.

    Raises:
        ValueError: weights that are negative, not finite, or all zero.
    """
    if weights is not None and not (np.all(weights >= 0) and 0 < np.sum(weights, dtype=np.float64) < np.inf):
        raise ValueError("weights: negative, not finite, or all zero; give weights >= 0, one of them positive")
    distinct, masses = _grouped(values, weights)
    if len(distinct) <= k:
        return np.concatenate([distinct, np.full(k - len(distinct), distinct[-1])])
    costs = _Costs(distinct, masses)
    edges = np.array([0, *_best_ends(costs, k), len(distinct)])
    return np.add.reduceat(masses * distinct, edges[:-1]) / np.add.reduceat(masses, edges[:-1])


def _best_ends(costs: _Costs, k: int) -> list[int]:
    """Where all clusters but the last end."""
    if k == 1:
        return []
    d, windows = len(costs.mass) - 1, _windows(costs, k)
    best = costs.of(0, np.arange(windows[0].low, windows[0].high + 1))
    splits = []
    for sources, ends in zip(windows, windows[1:], strict=False):
        best, split = _layer(costs, best, sources, ends)
        splits.append(split)
    last = np.arange(windows[-1].low, windows[-1].high + 1)
    found = [int(last[np.argmin(costs.best_from(best, last, d))])]
    for split, ends in zip(reversed(splits), reversed(windows[1:]), strict=True):
        found.append(int(split[found[-1] - ends.low]))
    return found[::-1]
