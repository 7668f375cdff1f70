"""Choosing the largest of many numbers, on the host: NumPy partitions a hundred times faster than XLA's CPU sorts."""

import numpy as np
from jaxtyping import Bool, Float


def largest(scores: Float[np.ndarray, " d"], count: int) -> Bool[np.ndarray, " d"]:
    """Which are the `count` largest; of equals the first.

    Raises:
        ValueError: a count that is negative or above d.
    """
    if not 0 <= count <= len(scores):
        raise ValueError(f"count: {count} of {len(scores)} scores; give a number between")
    if count == 0:
        return np.zeros(len(scores), bool)
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    chosen = scores > threshold
    equal = np.flatnonzero(scores == threshold)[: count - np.count_nonzero(chosen)]
    chosen[equal] = True
    return chosen
