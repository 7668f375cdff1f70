"""The closed-form refit against its formula, brute force, and its special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import N, P, make_problem

from solvers.gram import gram_statistics, least_squares, linear_error
from solvers.structure import column_structure, feature_structure, fit


@pytest.fixture
def stats():
    return gram_statistics(make_problem(400))


def masks(free, tail):
    index = jnp.arange(P)
    return jnp.isin(index, jnp.asarray(free, int)), jnp.isin(index, jnp.asarray(tail, int))


def alternating(stats, free, tail, rank, sweeps=3000, seed=0):
    """Least squares over u and (a, v) by turns: the same optimum without the closed form."""
    gram, cross = np.asarray(stats.gram), np.asarray(stats.cross)
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(N, rank)))[0]
    f, t = np.flatnonzero(free), np.flatnonzero(tail)
    v = np.zeros((rank, P))
    for _ in range(sweeps):
        a_free = (cross[:, f] - u @ v @ gram[:, f]) @ np.linalg.inv(gram[np.ix_(f, f)]) if len(f) else np.zeros((N, 0))
        a = np.zeros((N, P))
        a[:, f] = a_free
        rest = cross - a @ gram
        v = np.zeros((rank, P))
        v[:, t] = np.linalg.solve(u.T @ u, u.T @ rest[:, t]) @ np.linalg.inv(gram[np.ix_(t, t)])
        u = rest @ v.T @ np.linalg.inv(v @ gram @ v.T)
    return a + u @ v


CASES = [([0, 3], [1, 2, 5], 2), ([], [0, 1, 2, 3, 4, 5, 6], 3), ([0, 1, 6], [], 0), ([2], [0, 1, 3, 4, 5, 6], 1)]


@pytest.mark.parametrize(("free", "tail", "rank"), CASES)
def test_fit_is_the_optimum_and_has_the_structure(stats, free, tail, rank):
    f, t = masks(free, tail)
    m = fit(column_structure(stats.gram, f, t, rank), stats.cross)
    dropped = ~(f | t)
    assert jnp.all(m[:, dropped] == 0)
    assert jnp.linalg.matrix_rank(m[:, t]) <= rank if len(tail) else True
    best = alternating(stats, f, t, rank) if rank else None
    if best is None:
        gram = np.asarray(stats.gram)
        best = np.zeros((N, P))
        best[:, free] = np.asarray(stats.cross)[:, free] @ np.linalg.inv(gram[np.ix_(free, free)])
    np.testing.assert_allclose(linear_error(stats, m), linear_error(stats, jnp.asarray(best)), rtol=1e-6)


def test_everything_kept_gives_least_squares(stats):
    f, t = masks(range(P), [])
    np.testing.assert_allclose(fit(column_structure(stats.gram, f, t, 0), stats.cross), least_squares(stats), atol=1e-8)


def test_feature_structure_with_single_columns_equals_columns(stats):
    f, t = masks([1, 4, 5], [])
    by_columns = fit(column_structure(stats.gram, f, t, 0), stats.cross)
    by_features = fit(feature_structure(stats.gram, jnp.eye(P), f, jitter=0.0), stats.cross)
    np.testing.assert_allclose(by_features, by_columns, atol=1e-10)


def test_more_candidate_features_than_inputs(stats):
    features = jnp.concatenate([jnp.eye(P), jnp.ones((3, P))])
    kept = jnp.arange(P + 3) >= P  # three copies of one feature: dependent, held up by the jitter
    m = fit(feature_structure(stats.gram, features, kept), stats.cross)
    best = fit(feature_structure(stats.gram, features, jnp.arange(P + 3) == P), stats.cross)
    np.testing.assert_allclose(linear_error(stats, m), linear_error(stats, best), rtol=1e-6)


def test_weights_decide_what_the_factor_keeps(stats):
    f, t = masks([], range(P))
    structure = column_structure(stats.gram, f, t, 1)
    weights = jnp.asarray([1e6, 1.0, 1.0, 1.0, 1.0])
    m = fit(structure, stats.cross, weights)
    full = least_squares(stats)
    assert jnp.linalg.norm(m[0] - full[0]) < 1e-3 * jnp.linalg.norm(full[0])
    assert linear_error(stats, m) > linear_error(stats, fit(structure, stats.cross))


def test_one_compilation_serves_every_structure_and_vmap_agrees(stats):
    solve = jax.jit(lambda f, t, r: fit(column_structure(stats.gram, f, t, r), stats.cross))
    inputs = [(*masks(free, tail), jnp.asarray(rank)) for free, tail, rank in CASES]
    single = [solve(*case) for case in inputs]
    assert solve._cache_size() == 1
    batch = jax.vmap(solve)(*(jnp.stack(column) for column in zip(*inputs, strict=True)))
    np.testing.assert_allclose(batch, jnp.stack(single), atol=1e-10)
