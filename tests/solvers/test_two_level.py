from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers import columns, two_level
from solvers.gram import GramStatistics, least_squares, linear_error, with_ridge
from solvers.structure import column_structure, fit
from solvers.two_level_steps import closed_form, exchange, prepare, project

N, P = 6, 16
RANKS = np.array([1, 2, 3])
QUICK = replace(two_level.DEFAULT, rounds=2, max_steps=60, finalists=2)
SELECTORS = [two_level.select, two_level.select_greedy]


def run(select, stats, w, budget, ranks, gauge=True):
    """One signature for all calls: each selector is compiled once per shape."""
    return select(stats, w, budget, ranks, gauge=gauge, options=QUICK)


def statistics(seed, n=N, p=P, d=120, noise=0.1):
    """A layer whose matrix is a few strong columns plus low rank, on correlated inputs; not quite linear."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(d, p)) @ (np.eye(p) + 0.4 * rng.normal(size=(p, p)))
    w = 0.3 * rng.normal(size=(n, p)) + rng.normal(size=(n, 2)) @ rng.normal(size=(2, p))
    w[:, : p // 5] += 2 * rng.normal(size=(n, p // 5))
    t = x @ w.T + noise * rng.normal(size=(d, n)) + 1
    xc, tc = x - x.mean(0), t - t.mean(0)
    return GramStatistics(
        gram=jnp.asarray(xc.T @ xc / d),
        cross=jnp.asarray(tc.T @ xc / d),
        x_mean=jnp.asarray(x.mean(0)),
        target_mean=jnp.asarray(t.mean(0)),
        target_energy=jnp.asarray((tc**2).sum() / d),
    )


def refit_error(stats, form):
    """The error of the form's own closed-form fit, by another route than the selection's."""
    with jax.numpy_dtype_promotion("standard"):
        m = fit(column_structure(stats.gram, form.free, form.tail, form.rank), stats.cross)
    return float(linear_error(stats, m))


def check_form(stats, form, budget, gauge):
    n = stats.cross.shape[0]
    assert not bool(jnp.any(form.free & form.tail))
    assert (int(form.rank) == 0) == (not bool(jnp.any(form.tail)))
    assert int(two_level.cost(form.free, form.tail, form.rank, n, gauge=gauge)) <= budget
    assert float(form.error) == pytest.approx(refit_error(stats, form), rel=1e-6, abs=1e-9)


def alternate(stats, w, free, both, rank, rounds=3000):
    """F by alternating least squares over a, u, v: the slow way."""
    rng = np.random.default_rng(0)
    gram, w = np.asarray(stats.gram), np.asarray(w)
    s1, tail = np.flatnonzero(free), np.flatnonzero(both & ~free)
    u = np.linalg.qr(rng.normal(size=(w.shape[0], rank)))[0]
    cross = w @ gram
    v = np.zeros((rank, len(tail)))
    for _ in range(rounds):
        kept = np.concatenate([s1, tail])
        rest = np.linalg.solve(
            gram[np.ix_(tail, tail)]
            - gram[np.ix_(tail, s1)] @ np.linalg.solve(gram[np.ix_(s1, s1)], gram[np.ix_(s1, tail)]),
            np.eye(len(tail)),
        )
        residual = cross[:, tail] - cross[:, s1] @ np.linalg.solve(gram[np.ix_(s1, s1)], gram[np.ix_(s1, tail)])
        v = np.linalg.solve(u.T @ u, u.T @ residual @ rest)
        g_v = v @ np.linalg.inv(rest) @ v.T
        u = np.linalg.solve(g_v, v @ residual.T).T
    m = np.zeros_like(w)
    m[:, tail] = u @ v
    m[:, s1] = np.linalg.solve(gram[np.ix_(s1, s1)], (cross[:, s1] - m[:, tail] @ gram[np.ix_(tail, s1)]).T).T
    assert len(kept) == (free | both).sum()
    return np.trace((w - m) @ gram @ (w - m).T)


def test_closed_form_is_what_alternating_least_squares_converges_to():
    stats = statistics(0)
    w = least_squares(stats)
    free, both = np.arange(P) < 3, np.arange(P) < 11
    u, lost = closed_form(prepare(stats, w, True), jnp.asarray(free), jnp.asarray(both), jnp.asarray(2))
    assert float(lost) == pytest.approx(alternate(stats, w, free, both, 2), rel=1e-9)
    np.testing.assert_allclose(u.T @ u, np.diag([0, 0, 0, 0, 1, 1]), atol=1e-12)


def test_projection_takes_the_best_energy_per_stored_value_and_keeps_s1_within_s2():
    stats = statistics(1)
    problem = prepare(stats, least_squares(stats), True)
    e = jnp.asarray(np.random.default_rng(2).normal(size=(N, P)))
    rank = jnp.asarray(2)
    u = jnp.zeros((N, N)).at[:, -2:].set(jnp.linalg.qr(e[:, :2])[0])
    for room in (0, 7, 20, 50, N * P):
        d, free, both = project(problem, e, u, rank, jnp.asarray(room))
        assert not bool(jnp.any(free & ~both))
        spent = 2 * int(jnp.sum(both)) + (N - 2) * int(jnp.sum(free))
        assert spent <= room
        assert room - spent < N or bool(jnp.all(free))
        low = u @ (u.T @ e)
        expected = jnp.where(both[None, :], low, 0) + jnp.where(free[None, :], e - low, 0)
        np.testing.assert_allclose(d, expected)


def test_projection_is_within_one_item_of_the_best_of_all_choices():
    problem = prepare(statistics(3, p=5), least_squares(statistics(3, p=5)), True)
    e = jnp.asarray(np.random.default_rng(4).normal(size=(N, 5)))
    u = jnp.zeros((N, N)).at[:, -1:].set(jnp.linalg.qr(e[:, :1])[0])
    low = np.sum(np.asarray(u.T @ e) ** 2, axis=0)
    high = np.sum(np.asarray(e) ** 2, axis=0) - low
    room = 14
    value = {0: np.zeros(5), 1: low, 6: low + high}
    best = max(
        sum(value[c][j] for j, c in enumerate(levels)) for levels in product((0, 1, 6), repeat=5) if sum(levels) <= room
    )
    d, _, _ = project(problem, e, u, jnp.asarray(1), jnp.asarray(room))
    kept = float(jnp.sum(d * d))
    assert best - max(low + high) <= kept <= best + 1e-9


@pytest.mark.parametrize("gauge", [True, False])
@pytest.mark.parametrize("select", SELECTORS)
def test_forms_are_valid_within_budget_and_use_it_up(select, gauge):
    stats = statistics(5)
    w = least_squares(stats)
    for budget, rank in product((10, 33, 48, 75), (1, 2, 4)):
        form = run(select, stats, w, budget, rank, gauge=gauge)
        check_form(stats, form, budget, gauge)
        left = budget - int(two_level.cost(form.free, form.tail, form.rank, N, gauge=gauge))
        if int(form.rank):
            dropped = ~(form.free | form.tail)
            assert left < (rank if bool(jnp.any(dropped)) else N - rank)


@pytest.mark.parametrize("select", SELECTORS)
def test_rank_zero_is_columns(select):
    stats = statistics(6)
    w = least_squares(stats)
    form = run(select, stats, w, 7 * N + 3, 0)
    check_form(stats, form, 7 * N + 3, True)
    assert int(jnp.sum(form.free)) == 7
    scale = float(stats.target_energy)
    rest = float(linear_error(stats, w))
    columns_only = columns.column_error(stats.gram, w, columns.select(stats.gram, w, 7))
    assert float(form.error) - rest <= 1.1 * float(columns_only) / scale


def test_two_level_beats_columns_low_rank_and_a_random_choice():
    stats = statistics(7)
    w = least_squares(stats)
    form = run(two_level.select, stats, w, 48, 2)
    none = jnp.zeros(P, bool)
    rivals = [replace(form, free=columns.select(stats.gram, w, 48 // N), tail=none, rank=jnp.asarray(0))]
    rivals.append(replace(form, free=none, tail=~none, rank=jnp.asarray(2)))
    order = jnp.asarray(np.random.default_rng(0).permutation(P))
    rivals.append(replace(form, free=form.free[order], tail=form.tail[order]))
    assert all(float(form.error) < refit_error(stats, rival) for rival in rivals)


def test_exchanges_fill_the_room_and_lower_the_error():
    stats = statistics(8)
    w = least_squares(stats)
    problem = prepare(stats, w, True)
    rank, room = jnp.asarray(2), jnp.asarray(40)
    u, _ = closed_form(problem, jnp.zeros(P, bool), jnp.ones(P, bool), rank)

    def fixed_u(free, both):
        inner = u.T @ problem.w
        rest = problem.w - u @ inner
        return float(columns.column_error(stats.gram, least_rows(rest), free)) + float(
            columns.column_error(stats.gram, least_rows(inner), both)
        )

    def least_rows(rows):
        return rows / jnp.sqrt(jnp.diagonal(stats.gram))[None, :]

    poor = (jnp.arange(P) >= P - 3, jnp.arange(P) >= P - 9)
    filled = exchange(problem, u, rank, room, poor, 100)
    spent = 2 * int(jnp.sum(filled[1])) + 4 * int(jnp.sum(filled[0]))
    assert 40 - 2 < spent <= 40
    assert not bool(jnp.any(filled[0] & ~filled[1]))
    assert fixed_u(*filled) < 0.9 * fixed_u(*poor)
    again = exchange(problem, u, rank, room, filled, 100)
    assert fixed_u(*again) == pytest.approx(fixed_u(*filled), rel=1e-6)


def test_best_is_no_worse_than_columns_and_near_the_best_of_its_ranks():
    stats = statistics(9)
    w = least_squares(stats)
    for budget in (20, 48):
        form = run(two_level.best, stats, w, budget, RANKS)
        check_form(stats, form, budget, True)
        pure = columns.select(stats.gram, w, budget // N)
        pure = replace(form, free=pure, tail=jnp.zeros(P, bool), rank=jnp.asarray(0))
        assert float(form.error) <= refit_error(stats, pure) * (1 + 1e-9)
        parts = [run(f, stats, w, budget, int(r)) for f in SELECTORS for r in RANKS]
        assert float(form.error) <= 1.05 * min(float(part.error) for part in parts)


def test_best_finds_pure_low_rank_where_that_is_the_truth():
    rng = np.random.default_rng(10)
    stats = statistics(10, noise=0.0)
    w = jnp.asarray(rng.normal(size=(N, 2)) @ rng.normal(size=(2, P)))
    cross = w @ stats.gram
    stats = replace(stats, cross=cross, target_energy=jnp.sum(cross * w))
    form = run(two_level.best, stats, w, 2 * P + 2 * (N - 2), RANKS)
    assert int(form.rank) == 2
    assert bool(jnp.all(form.tail))
    assert float(form.error) < 1e-10


@pytest.mark.parametrize("gauge", [True, False])
def test_the_sum_keeps_every_column_in_one_part_or_the_other(gauge):
    stats = statistics(11)
    w = least_squares(stats)
    form = run(two_level.select_sum, stats, w, 60, RANKS, gauge=gauge)
    check_form(stats, form, 60, gauge)
    assert int(form.rank) == 0 or bool(jnp.all(form.free | form.tail))
    pure = run(two_level.select_sum, stats, w, 60, np.array([0, 0, 0]), gauge=gauge)
    assert int(jnp.sum(pure.free)) == 10
    assert float(form.error) <= float(pure.error)


def test_a_budget_that_does_not_pay_for_the_rank_keeps_nothing():
    stats = statistics(12)
    w = least_squares(stats)
    for form in (
        run(two_level.select, stats, w, 4, 2),
        run(two_level.select_greedy, stats, w, 4, 2),
        run(two_level.select_sum, stats, w, 20, np.array([2, 2, 2])),
    ):
        assert not bool(jnp.any(form.free | form.tail))
        assert int(form.rank) == 0
        assert float(form.error) == pytest.approx(1, abs=1e-9)


def test_a_full_budget_loses_nothing():
    stats = statistics(13)
    w = least_squares(stats)
    rest = float(linear_error(stats, w))
    form = run(two_level.best, stats, w, N * P, RANKS)
    assert float(form.error) == pytest.approx(rest, rel=1e-6)


def test_one_compilation_serves_budgets_and_ranks():
    stats = statistics(14)
    w = least_squares(stats)
    run(two_level.select, stats, w, 10, 1)
    compiled = two_level.select._cache_size()
    for budget, rank in ((20, 2), (30, 0), (45, 5)):
        run(two_level.select, stats, w, budget, rank)
    assert two_level.select._cache_size() == compiled


def test_vmap_equals_the_loop():
    layers = [statistics(s) for s in (15, 16)]
    grams, crosses = jnp.stack([s.gram for s in layers]), jnp.stack([s.cross for s in layers])

    def one(gram, cross):
        stats = replace(layers[0], gram=gram, cross=cross, target_energy=jnp.ones(()))
        return run(two_level.select, stats, least_squares(stats), 48, 2)

    both = jax.vmap(one)(grams, crosses)
    for i in range(2):
        alone = one(grams[i], crosses[i])
        assert both.free[i].tolist() == alone.free.tolist()
        assert both.tail[i].tolist() == alone.tail.tolist()
        assert float(both.error[i]) == pytest.approx(float(alone.error), rel=1e-9)


def test_more_outputs_than_inputs():
    stats = statistics(17, n=20, p=8)
    w = least_squares(stats)
    for rank in (2, 4):
        form = run(two_level.select, stats, w, 90, rank)
        check_form(stats, form, 90, True)
        assert float(form.error) < 1


def test_fewer_rows_than_inputs_with_a_ridge():
    stats = with_ridge(statistics(18, d=10), 1e-6)
    w = least_squares(stats)
    form = run(two_level.best, stats, w, 48, RANKS)
    assert np.isfinite(float(form.error))
    assert int(two_level.cost(form.free, form.tail, form.rank, N)) <= 48
    assert refit_error(stats, form) < 0.5


def test_float32_agrees_with_float64():
    stats = statistics(19)
    w = least_squares(stats)
    exact = run(two_level.select, stats, w, 48, 2)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), stats)
    with jax.enable_x64(False):
        form = run(two_level.select, single, w.astype(jnp.float32), 48, 2)
    assert form.error.dtype == jnp.float32
    assert refit_error(stats, form) <= 1.1 * float(exact.error)


def test_the_schedule_and_the_ranks_depend_on_the_width():
    assert two_level.options_for(288) == two_level.SMALL
    assert two_level.options_for(576) == two_level.DEFAULT
    assert two_level.options_for(4608) == two_level.LARGE
    assert two_level.rank_grid(64, 576).tolist() == [8, 12, 16, 20, 24, 28, 32, 36, 40, 48]
    assert two_level.rank_grid(512, 4608).tolist() == [192, 320]
    assert two_level.rank_grid(64, 576, gauge=False).tolist() == [4, 8, 12, 16, 20, 24, 32]
    assert two_level.rank_grid(3, 5).tolist() == [1, 2]


def test_a_matrix_of_another_shape_is_refused():
    stats = statistics(20)
    for select in (*SELECTORS, two_level.best, two_level.select_sum):
        ranks = 1 if select in SELECTORS else jnp.asarray([1])
        with pytest.raises(ValueError, match=r"w has the shape \(5, 16\).*least_squares"):
            select(stats, jnp.ones((5, P)), 48, ranks)
