"""Statistics of a layer's rows, against NumPy on all rows at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import N, P, make_problem

from solvers.gram import best_bias, gram_statistics, least_squares, linear_error, with_ridge


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("d", [300, 9000])
def test_moments_are_those_of_numpy(d, offset):
    problem = make_problem(d, offset=offset)
    stats = gram_statistics(problem)
    target = np.asarray(problem.response) - (np.asarray(problem.offset) if offset else 0)
    both = np.cov(np.concatenate([target, np.asarray(problem.x)], axis=1).T, bias=True)
    np.testing.assert_allclose(stats.gram, both[N:, N:], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(stats.cross, both[:N, N:], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(stats.target_energy, np.trace(both[:N, :N]), rtol=1e-10)


def test_linear_error_and_bias_are_those_of_the_rows():
    problem = make_problem(500)
    stats = gram_statistics(problem)
    m = jnp.asarray(np.random.default_rng(1).normal(size=(N, P)))
    gap = problem.response - problem.x @ m.T - best_bias(stats, m)[None, :]
    spread = problem.response - jnp.mean(problem.response, axis=0, keepdims=True)
    np.testing.assert_allclose(linear_error(stats, m), jnp.sum(gap**2) / jnp.sum(spread**2), rtol=1e-10)
    other = jnp.sum((gap + 0.01) ** 2)
    assert jnp.sum(gap**2) < other


def test_least_squares_finds_the_layer_itself():
    stats = gram_statistics(make_problem(400))
    assert linear_error(stats, least_squares(stats)) < 1e-13


def test_weights_scale_the_outputs():
    plain, weighted = gram_statistics(make_problem(400)), gram_statistics(make_problem(400, weights=True))
    np.testing.assert_allclose(weighted.cross, plain.cross * jnp.sqrt(jnp.arange(1.0, N + 1))[:, None], rtol=1e-12)


def test_ridge_makes_a_singular_gram_definite():
    problem = make_problem(4)
    stats = with_ridge(gram_statistics(problem), 1e-6)
    assert jnp.linalg.eigvalsh(stats.gram)[0] > 0
    zero = jax.tree.map(jnp.zeros_like, stats)
    np.testing.assert_array_equal(with_ridge(zero, 1e-6).gram, np.eye(P))
    assert linear_error(with_ridge(zero, 1e-6), jnp.zeros((N, P))) == 0
