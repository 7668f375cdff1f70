from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers import spatial
from solvers.gram import GramStatistics, least_squares, linear_error
from solvers.spatial import SpatialOptions
from solvers.spatial_factor import Moments, eliminated_objective, weighted_svd
from solvers.structure import feature_structure, fit

WINDOW, C_IN, N = (3, 3), 4, 10
P = 36


def make_stats(w: np.ndarray, seed: int = 0, dtype: type = np.float64) -> GramStatistics:
    """Moments of correlated inputs for the target x w'."""
    n, p = w.shape
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * p, p)) @ (np.eye(p) + 0.3 * rng.normal(size=(p, p)))
    gram = x.T @ x / len(x)
    cross = w @ gram
    arrays = {"gram": gram, "cross": cross, "x_mean": np.zeros(p), "target_mean": np.zeros(n)}
    energy = jnp.asarray(np.sum(cross * w), dtype)
    return GramStatistics(**{k: jnp.asarray(v, dtype) for k, v in arrays.items()}, target_energy=energy)


def spatial_matrix(rng: np.random.Generator, n: int, window: tuple[int, int], c_in: int, rank: int) -> np.ndarray:
    first = rng.normal(size=(rank, window[1] * c_in))
    second = rng.normal(size=(n, window[0], rank))
    return np.einsum("ois,sq->oiq", second, first).reshape(n, -1)


def refit_error(stats: GramStatistics, found: spatial.SpatialColumns, window: tuple[int, int], c_in: int) -> float:
    """Relative error of least squares on the kept features, by NumPy."""
    rows, kept = spatial.features(found.first, found.rank, found.columns, window, c_in)
    t = np.asarray(rows)[np.asarray(kept)]
    aim = np.asarray(stats.cross) @ t.T
    second = np.linalg.lstsq(t @ np.asarray(stats.gram) @ t.T, aim.T, rcond=None)[0].T
    return 1 - np.sum(second * aim) / float(stats.target_energy)


def cost(found: spatial.SpatialColumns, n: int, window: tuple[int, int], gauge: bool) -> float:
    q, rank = found.first.shape[1], int(found.rank)
    return rank * (q + window[0] * n) - gauge * rank**2 + n * int(found.columns.sum())


@pytest.fixture(scope="module")
def random_layer() -> tuple[GramStatistics, jax.Array]:
    with jax.enable_x64(True):
        w = np.random.default_rng(1).normal(size=(N, P))
        stats = make_stats(w)
        return stats, least_squares(stats)


def test_gradient_of_the_eliminated_objective(random_layer):
    stats, _ = random_layer
    rng = np.random.default_rng(2)
    used = jnp.arange(4) < 3
    b = jnp.asarray(rng.normal(size=(4, 12))) * used.astype(float)[:, None]
    moments, ridge = Moments(stats.gram, stats.cross), jnp.asarray(0.01)
    value = jax.jit(lambda b: eliminated_objective(b, moments, used, ridge))
    gradient = value(b)[1]
    assert not gradient[3].any()
    for _ in range(5):
        step = jnp.asarray(rng.normal(size=b.shape)) * used.astype(float)[:, None]
        slope = (value(b + 1e-5 * step)[0] - value(b - 1e-5 * step)[0]) / 2e-5
        np.testing.assert_allclose(jnp.sum(gradient * step), slope, rtol=1e-6)


def test_value_of_the_eliminated_objective_is_the_least_squares_error(random_layer):
    stats, _ = random_layer
    b = jnp.asarray(np.random.default_rng(3).normal(size=(3, 12)))
    value, _ = eliminated_objective(b, Moments(stats.gram, stats.cross), jnp.ones(3, bool), jnp.zeros(()))
    t = np.kron(np.eye(3), np.asarray(b))
    aim = np.asarray(stats.cross) @ t.T
    np.testing.assert_allclose(value, -np.sum(np.linalg.solve(t @ stats.gram @ t.T, aim.T) * aim.T), rtol=1e-9)


def test_recovers_a_spatially_low_rank_layer():
    w = spatial_matrix(np.random.default_rng(4), N, WINDOW, C_IN, 3)
    stats = make_stats(w)
    budget = 3 * (12 + 3 * N) - 9
    found = spatial.select(stats, jnp.asarray(w), WINDOW, budget, 3)
    assert int(found.rank) == 3
    assert not found.columns.any()
    assert found.error < 1e-8


def test_recovers_a_spatially_low_rank_layer_plus_columns():
    rng = np.random.default_rng(5)
    w = spatial_matrix(rng, N, WINDOW, C_IN, 2)
    planted = np.array([3, 17, 30])
    w[:, planted] += 2 * rng.normal(size=(N, 3))
    stats = make_stats(w)
    budget = 2 * (12 + 3 * N) - 4 + 3 * N
    found = spatial.select(stats, jnp.asarray(w), WINDOW, budget, 2)
    np.testing.assert_array_equal(np.flatnonzero(found.columns), planted)
    assert found.error < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_never_worse_than_the_weighted_svd(random_layer, rank):
    stats, w = random_layer
    b = np.asarray(weighted_svd(w, stats.gram, 12, 8))[:rank]
    t = np.kron(np.eye(3), b)
    aim = np.asarray(stats.cross) @ t.T
    start = 1 - np.sum(np.linalg.solve(t @ np.asarray(stats.gram) @ t.T, aim.T).T * aim) / float(stats.target_energy)
    found = spatial.select(stats, w, WINDOW, rank * (12 + 3 * N), rank, gauge=False)
    assert int(found.rank) == rank
    assert found.error < start


def test_error_is_that_of_the_refit(random_layer):
    stats, w = random_layer
    found = spatial.best(stats, w, WINDOW, 0.5 * N * P)
    np.testing.assert_allclose(found.error, refit_error(stats, found, WINDOW, C_IN), rtol=1e-6)
    with jax.numpy_dtype_promotion("standard"):
        rows, kept = spatial.features(found.first, found.rank, found.columns, WINDOW, C_IN)
        m = fit(feature_structure(stats.gram, rows, kept), stats.cross)
    np.testing.assert_allclose(found.error, linear_error(stats, m), rtol=1e-5)


def test_first_factor_is_orthonormal_and_padded_with_zeros(random_layer):
    stats, w = random_layer
    found = spatial.select(stats, w, WINDOW, 200, 3)
    rank, first = int(found.rank), np.asarray(found.first)
    block = sum(np.asarray(stats.gram)[i : i + 12, i : i + 12] for i in (0, 12, 24)) / 3
    np.testing.assert_allclose(first[:rank] @ block @ first[:rank].T, np.eye(rank), atol=1e-6)
    assert not first[rank:].any()


@pytest.mark.parametrize("gauge", [False, True])
def test_budget_is_never_exceeded_and_hardly_wasted(random_layer, gauge):
    stats, w = random_layer
    for budget in (5, 30, 60, 180, 181.7, 290):
        for rank in (0, 2, 7, 100):
            found = spatial.select(stats, w, WINDOW, budget, rank, gauge=gauge)
            stored = cost(found, N, WINDOW, gauge)
            assert stored <= budget
            assert budget - stored < N
            assert int(found.rank) <= rank


def test_pivot_indices_are_paid_for(random_layer):
    stats, w = random_layer
    free = spatial.select(stats, w, WINDOW, 200, 4)
    priced = spatial.select(stats, w, WINDOW, 200, 4, pivot_cost=20.0)
    assert cost(priced, N, WINDOW, True) + 20 * int(priced.rank) <= 200 < cost(free, N, WINDOW, True) + 80


def test_best_is_the_best_of_its_ranks(random_layer):
    stats, w = random_layer
    ranks = spatial.rank_grid(N, P, WINDOW, 150)
    errors = [float(spatial.select(stats, w, WINDOW, 150, r).error) for r in ranks]
    found = spatial.best(stats, w, WINDOW, 150)
    np.testing.assert_allclose(found.error, min(errors), rtol=1e-9)
    assert int(found.rank) == ranks[int(np.argmin(errors))]


def test_the_grid_of_ranks_ends_at_the_budget():
    for gauge in (False, True):
        ranks = np.asarray(spatial.rank_grid(N, P, WINDOW, 170, gauge=gauge))
        assert (np.diff(ranks) >= 0).all()
        costs = [r * (12 + 3 * N) - gauge * r * r for r in (ranks[-1], ranks[-1] + 1)]
        assert costs[0] <= 170 < costs[1]


def test_rank_zero_is_forward_selection_of_columns(random_layer):
    stats, w = random_layer
    found = spatial.select(stats, w, WINDOW, 4 * N, 0)
    gram, cross, kept = np.asarray(stats.gram), np.asarray(stats.cross), []
    for _ in range(4):  # the definition: the column whose addition explains most
        trials = [[*kept, j] for j in range(P) if j not in kept]
        gains = [np.sum(np.linalg.solve(gram[np.ix_(s, s)], cross[:, s].T) * cross[:, s].T) for s in trials]
        kept = trials[int(np.argmax(gains))]
    np.testing.assert_array_equal(np.flatnonzero(found.columns), sorted(kept))


def test_a_larger_budget_never_hurts_much(random_layer):
    stats, w = random_layer
    errors = [float(spatial.best(stats, w, WINDOW, b).error) for b in (40, 80, 160, 240, 320)]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False))


def test_one_compilation_for_all_budgets_ranks_and_prices(random_layer):
    stats, w = random_layer
    spatial.select(stats, w, WINDOW, 100, 2)
    before = spatial._best._cache_size()
    for budget, rank, gauge in ((150.5, 5, True), (200, 0, False), (60, jnp.asarray(2), True)):
        spatial.select(stats, w, WINDOW, budget, rank, gauge=gauge, pivot_cost=0.5)
    assert spatial._best._cache_size() == before


@pytest.mark.parametrize("window", [(2, 3), (3, 1)])
def test_rectangular_windows(window):
    rng = np.random.default_rng(7)
    w = spatial_matrix(rng, 6, window, 5, 2)
    stats = make_stats(w, seed=8)
    q = window[1] * 5
    found = spatial.select(stats, jnp.asarray(w), window, 2 * (q + window[0] * 6), 2, gauge=False)
    assert found.error < 1e-8
    assert refit_error(stats, found, window, 5) < 1e-8


def test_cheaper_options_hold_their_bounds_and_stay_close(random_layer):
    stats, w = random_layer
    options = SpatialOptions(max_rank=3, max_columns=9, rounds=1, max_steps=5, memory=2, block=4)
    plain = spatial.select(stats, w, WINDOW, 3 * (12 + 3 * N) - 9 + 9 * N, 3)
    cheap = spatial.select(stats, w, WINDOW, 230, 100, options=options)
    assert cheap.first.shape == (3, 12)
    assert int(cheap.rank) == 3
    assert int(cheap.columns.sum()) == int(plain.columns.sum()) == 9
    np.testing.assert_allclose(cheap.error, refit_error(stats, cheap, WINDOW, C_IN), rtol=1e-6)
    assert cheap.error < 1.2 * plain.error


def test_float32_agrees_with_float64(random_layer):
    stats, w = random_layer
    exact = spatial.select(stats, w, WINDOW, 180, 3)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stats)
    with jax.enable_x64(False):
        found = spatial.select(single, w.astype(jnp.float32), WINDOW, 180, 3)
    assert found.error.dtype == found.first.dtype == jnp.float32
    np.testing.assert_allclose(found.error, exact.error, rtol=0.05)


def test_moments_that_are_not_finite_give_an_infinite_error(random_layer):
    stats, w = random_layer
    broken = replace(stats, gram=stats.gram.at[0, 0].set(jnp.nan))
    assert spatial.select(broken, w, WINDOW, 180, 2).error == jnp.inf


def test_a_zero_target_is_represented_by_anything():
    stats = make_stats(np.zeros((N, P)))
    found = spatial.select(stats, jnp.zeros((N, P)), WINDOW, 180, 2)
    np.testing.assert_allclose(found.error, 0, atol=1e-12)


def test_large_layers_get_cheaper_options():
    assert SpatialOptions.for_size(64, 576, (3, 3)) == SpatialOptions()
    large = SpatialOptions.for_size(256, 2304, (3, 3))
    assert large.max_steps < SpatialOptions().max_steps
    assert large.max_rank is not None
    assert large.max_rank < spatial.rank_bound(256, 2304, (3, 3))


@pytest.mark.parametrize(
    ("window", "options", "message"),
    [
        ((3,), None, "window"),
        ((5, 5), None, "window"),
        (WINDOW, SpatialOptions(max_rank=13), "max_rank=13"),
        (WINDOW, SpatialOptions(max_columns=0), "max_columns=0"),
        (WINDOW, SpatialOptions(block=0), "block"),
    ],
)
def test_what_does_not_fit_is_refused(random_layer, window, options, message):
    stats, w = random_layer
    with pytest.raises(ValueError, match=message):
        spatial.select(stats, w, window, 100, 2, options=options)


def test_arrays_of_different_layers_are_refused(random_layer):
    stats, w = random_layer
    with pytest.raises(ValueError, match="cross"):
        spatial.select(stats, w[:5], WINDOW, 100, 2)
    with pytest.raises(ValueError, match="c_in"):
        spatial.features(jnp.ones((2, 12)), 2, jnp.ones(P, bool), WINDOW, 5)
