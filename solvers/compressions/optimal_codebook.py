"""Exact k-means on a line by dynamic programming, vectorised over whole levels of its divide and conquer."""

import numpy as np
from jaxtyping import Float


class _Costs:
    """Squared error of the increasing values i ... j - 1 around their mean, weighted by masses, from prefix sums.

    cost(i, j) = second[j] - second[i] - (first[j] - first[i])^2 / (mass[j] - mass[i]).
    """

    def __init__(self, values: Float[np.ndarray, " d"], masses: Float[np.ndarray, " d"]):
        centred = values - np.average(values, weights=masses)
        self.mass, self.first, self.second = (
            np.concatenate([[0.0], np.cumsum(terms)]) for terms in (masses, masses * centred, masses * centred**2)
        )

    def head(self, before: np.ndarray) -> np.ndarray:
        """before[i] and what of cost(i, j) depends on i alone."""
        return before - self.second

    def gain(self, i: np.ndarray, j: np.ndarray | int) -> np.ndarray:
        """What cost(i, j) subtracts for both together."""
        step = self.first[j] - self.first[i]
        return step * step / (self.mass[j] - self.mass[i])


def _layer(costs: _Costs, before: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """best[j] = min over i of before[i] + cost(i, j), and the i: each more cluster is one such layer.

    The best i never falls with j, so the middle j of a range halves the search for the others. All ranges of one depth
    are searched at once: d comparisons a depth, d log d in all.
    """
    d = len(before) - 1
    head = costs.head(before)
    best, split = np.full(d + 1, np.inf), np.zeros(d + 1, np.int64)
    low, high = np.array([clusters]), np.array([d + 1])  # the j that each range holds
    left, right = np.array([clusters - 1]), np.array([d])  # the i that may be best for them
    while len(low):
        middle = (low + high) // 2
        ends = np.minimum(right, middle - 1) + 1
        counts = ends - left
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        owner = np.repeat(np.arange(len(low)), counts)
        i = np.arange(len(owner)) - starts[owner] + left[owner]
        value = head[i] - costs.gain(i, middle[owner])
        least = np.minimum.reduceat(value, starts)
        hits = np.flatnonzero(value == least[owner])[::-1]
        at = np.empty(len(low), np.int64)
        at[owner[hits]] = hits  # the last written is the first of equals
        best[middle], split[middle] = least + costs.second[middle], i[at]
        low, high = np.concatenate([low, middle + 1]), np.concatenate([middle, high])
        left, right = np.concatenate([left, i[at]]), np.concatenate([i[at], right])
        live = low < high
        low, high, left, right = low[live], high[live], left[live], right[live]
    return best, split


def _last(costs: _Costs, before: np.ndarray, clusters: int) -> int:
    """The i of `_layer` for j = d, which is all that is read of the last layer."""
    d = len(before) - 1
    i = np.arange(clusters - 1, d)
    return int(i[np.argmin(costs.head(before)[i] - costs.gain(i, d))])


def _grouped(
    values: Float[np.ndarray, " d"], weights: Float[np.ndarray, " d"] | None
) -> tuple[Float[np.ndarray, " distinct"], Float[np.ndarray, " distinct"]]:
    """The distinct values that weigh something, increasing, and what they weigh."""
    if weights is None:
        distinct, counts = np.unique(values, return_counts=True)
        return distinct.astype(np.float64), counts.astype(np.float64)
    distinct, place = np.unique(values, return_inverse=True)
    masses = np.bincount(place, weights, len(distinct))
    return distinct[masses > 0].astype(np.float64), masses[masses > 0]


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
    d = len(distinct)
    if d <= k:
        return np.concatenate([distinct, np.full(k - d, distinct[-1])])
    costs = _Costs(distinct, masses)
    best = np.concatenate([[0.0], costs.second[1:] - costs.first[1:] ** 2 / costs.mass[1:]])
    splits = []
    for clusters in range(2, k):
        best, split = _layer(costs, best, clusters)
        splits.append(split)
    ends = [d] if k == 1 else [d, _last(costs, best, k)]
    for split in reversed(splits):
        ends.append(int(split[ends[-1]]))
    edges = [0, *reversed(ends)]
    return np.array([np.average(distinct[a:b], weights=masses[a:b]) for a, b in zip(edges, edges[1:], strict=False)])
