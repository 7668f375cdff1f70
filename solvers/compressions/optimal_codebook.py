"""Exact k-means on a line by dynamic programming, vectorised over whole levels of its divide and conquer."""

import numpy as np
from jaxtyping import Float


class _Costs:
    """Squared error of the sorted values i ... j - 1 around their mean, from prefix sums."""

    def __init__(self, values: Float[np.ndarray, " d"]):
        centred = values.astype(np.float64) - np.mean(values, dtype=np.float64)
        self.first = np.concatenate([[0.0], np.cumsum(centred)])
        self.second = np.concatenate([[0.0], np.cumsum(centred * centred)])


def _layer(costs: _Costs, before: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """best[j] = min over i of before[i] + cost(i, j), and the i: each more cluster is one such layer.

    The best i never falls with j, so the middle j of a range halves the search for the others. All ranges of one depth
    are searched at once: d comparisons a depth, d log d in all.
    """
    d = len(before) - 1
    head = before - costs.second  # cost(i, j) = second[j] - second[i] - (first[j] - first[i])^2 / (j - i)
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
        j = middle[owner]
        step = costs.first[j] - costs.first[i]
        value = head[i] - step * step / (j - i)
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


def optimal_centers(values: Float[np.ndarray, " d"], k: int) -> Float[np.ndarray, " k"]:
    """Increasing centers of least squared error; equal ones where there are fewer distinct values than k.

    Args:
        values: in any order.
        k: how many centers, at most d.
    """
    ordered = np.sort(values)
    distinct = np.unique(ordered)
    if len(distinct) <= k:
        return np.concatenate([distinct, np.full(k - len(distinct), distinct[-1])])
    costs = _Costs(ordered)
    d = len(ordered)
    counts = np.arange(d + 1)
    best = costs.second - costs.first**2 / np.maximum(counts, 1)
    splits = []
    for clusters in range(2, k + 1):
        best, split = _layer(costs, best, clusters)
        splits.append(split)
    ends = [d]
    for split in reversed(splits):
        ends.append(int(split[ends[-1]]))
    edges = [0, *reversed(ends)]
    return np.array([ordered[a:b].mean(dtype=np.float64) for a, b in zip(edges, edges[1:], strict=False)])
