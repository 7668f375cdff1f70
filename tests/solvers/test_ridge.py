import jax.numpy as jnp
import numpy as np
import pytest

from solvers import ridge
from solvers.activation import RELU
from solvers.gram import gram_statistics, least_squares, with_ridge
from solvers.reconstruction import LayerProblem

N, P = 4, 20
TRIALS = [1e-6 * 10.0**k for k in range(8)]


def rows_of(d, seed, noise=0.5):
    """Rows with a decaying spectrum, offset and weights, of one layer whose responses are noisy."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(d, P)) * 0.8 ** np.arange(P) + 0.3
    offset = rng.normal(size=(d, N))
    response = x @ layer().T + 1 + offset + noise * rng.normal(size=(d, N))
    return LayerProblem(
        x=jnp.asarray(x),
        y=jnp.maximum(jnp.asarray(response), 0),
        response=jnp.asarray(response),
        bias=jnp.ones(N),
        offset=jnp.asarray(offset),
        weights=jnp.arange(1.0, N + 1),
        activation=RELU,
    )


def layer():
    return np.random.default_rng(7).normal(size=(N, P))


def by_gram(raw, held_out, original):
    """What `regularize` computes for each ridge, from p x p matrices."""
    stats = [with_ridge(raw, trial, original) for trial in TRIALS]
    return [float(ridge._held_out_error(s, least_squares(s), held_out)) for s in stats]


@pytest.mark.parametrize("known", [True, False])
def test_errors_from_few_rows_are_those_of_the_gram_matrix(known):
    problem, other = rows_of(8, 0), rows_of(6, 1)
    raw, held_out = gram_statistics(problem), gram_statistics(other)
    original = jnp.asarray(layer()) * jnp.sqrt(problem.weights)[:, None] if known else jnp.zeros((N, P))
    shifts = jnp.trace(raw.gram) / P * jnp.asarray(TRIALS)
    rows = [ridge._rows(p, s, jnp.float64) for p, s in ((problem, raw), (other, held_out))]
    found = ridge._held_out_errors_by_rows(*rows, shifts, original)
    np.testing.assert_allclose(found, by_gram(raw, held_out, original if known else None), rtol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_the_ridge_of_few_rows_is_the_best_on_held_out_rows(noise):
    problem, other = rows_of(8, 0, noise), rows_of(6, 1, noise)
    original = jnp.asarray(layer())
    found = ridge.selection_statistics(problem, other, ridge=1e-6, float64_up_to=P, original=original)
    scaled = original * jnp.sqrt(problem.weights)[:, None]
    errors = by_gram(found.raw, found.held_out, scaled)
    assert found.ridge == pytest.approx(TRIALS[int(np.argmin(errors))])
    np.testing.assert_allclose(found.w, least_squares(with_ridge(found.raw, found.ridge, scaled)), rtol=1e-6, atol=1e-9)


def test_rows_without_numbers_take_the_largest_ridge():
    problem, other = rows_of(8, 0), rows_of(6, 1)
    broken = LayerProblem(**{**vars(other), "response": other.response * jnp.nan})
    assert ridge.selection_statistics(problem, broken, ridge=1e-6, float64_up_to=P).ridge == pytest.approx(10)
