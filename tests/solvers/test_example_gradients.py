"""Sums of squared gradients of single examples, against those gradients; and choosing the largest."""

import jax.numpy as jnp
import numpy as np
import pytest

from solvers.example_gradients import sum_of_squares_by_pairs, sum_of_squares_one_by_one
from solvers.selection import largest


@pytest.mark.parametrize("s", [1, 2, 5])
def test_both_ways_give_the_sum_of_squares(s):
    rng = np.random.default_rng(s)
    rows, delta = rng.normal(size=(6, s, 4)), rng.normal(size=(6, s, 3))
    expected = sum((x.T @ d) ** 2 for x, d in zip(rows, delta, strict=True))
    pair = jnp.asarray(rows), jnp.asarray(delta)
    np.testing.assert_allclose(sum_of_squares_by_pairs(*pair), expected)
    np.testing.assert_allclose(sum_of_squares_one_by_one(*pair, lambda x: x), expected)


@pytest.mark.parametrize("count", [0, 1, 7, 50])
def test_largest_of_many_with_ties(count):
    scores = np.round(np.random.default_rng(0).normal(size=50), 1)
    expected = np.zeros(50, bool)
    expected[np.argsort(-scores, kind="stable")[:count]] = True
    np.testing.assert_array_equal(largest(scores, count), expected)


@pytest.mark.parametrize("count", [-1, 51])
def test_bad_counts(count):
    with pytest.raises(ValueError, match=f"count: {count} of 50"):
        largest(np.zeros(50), count)
