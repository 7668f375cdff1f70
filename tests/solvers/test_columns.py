from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers import columns
from solvers.pivots import no_pivots, pivot, swept

N, P = 4, 10
ORDERS = [columns.obs_order, columns.forward_order]


def problem(seed, n=N, p=P, d=60):
    """Correlated inputs of very different scales."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(d, p)) @ (np.eye(p) + 0.6 * rng.normal(size=(p, p))) * np.exp(rng.normal(size=p))[None, :]
    return jnp.asarray(x.T @ x / d), jnp.asarray(rng.normal(size=(n, p)))


def brute_error(gram, w, kept):
    """F by least squares on the kept columns, in NumPy."""
    gram, w, kept = np.asarray(gram), np.asarray(w), np.asarray(kept, int)
    m = np.zeros_like(w)
    if len(kept):
        m[:, kept] = np.linalg.solve(gram[np.ix_(kept, kept)], (w @ gram)[:, kept].T).T
    return np.trace((w - m) @ gram @ (w - m).T)


def mask_of(kept, p=P):
    return jnp.zeros(p, bool).at[jnp.asarray(kept)].set(True)


def naive_obs(gram, w):
    """OBS as the textbook has it; the columns in the order of removal, last one first."""
    inverse, a, left, gone = np.linalg.inv(gram), np.array(w), set(range(gram.shape[0])), []
    while left:
        j = min(left, key=lambda j: np.sum(a[:, j] ** 2) / inverse[j, j])
        a = a - np.outer(a[:, j], inverse[j]) / inverse[j, j]
        inverse = inverse - np.outer(inverse[j], inverse[j]) / inverse[j, j]
        left.remove(j)
        gone.append(j)
        rest = sorted(left)
        inverse[j], inverse[:, j] = 0, 0
        assert np.all(np.diag(inverse)[rest] > 0)
    return gone[::-1]


def test_error_curve_is_the_error_of_the_refit_for_every_size():
    gram, w = problem(0)
    order = jnp.asarray(np.random.default_rng(1).permutation(P))
    curve = columns.error_curve(gram, w, order)
    expected = [brute_error(gram, w, order[:k]) for k in range(P + 1)]
    np.testing.assert_allclose(curve, expected, rtol=1e-8, atol=1e-9 * expected[0])
    np.testing.assert_allclose(columns.column_error(gram, w, mask_of(order[:4])), expected[4], rtol=1e-8)


@pytest.mark.parametrize("block", [3, 32])
def test_obs_is_the_textbook_elimination_whatever_the_block(block):
    gram, w = problem(2)
    assert columns.obs_order(gram, w, block=block).tolist() == naive_obs(gram, w)


def test_forward_order_adds_the_best_column_each_time():
    gram, w = problem(3)
    order = columns.forward_order(gram, w, block=4).tolist()
    assert sorted(order) == list(range(P))
    for k in range(P - 1):
        errors = {j: brute_error(gram, w, [*order[:k], j]) for j in range(P) if j not in order[:k]}
        assert errors[order[k]] == pytest.approx(min(errors.values()), rel=1e-8)


@pytest.mark.parametrize("order", ORDERS)
def test_orders_do_not_depend_on_column_scales(order):
    gram, w = problem(4)
    scale = jnp.asarray(10.0 ** np.random.default_rng(0).uniform(-3, 3, P))
    rescaled = order(gram * scale[:, None] * scale[None, :], w / scale[None, :])
    assert rescaled.tolist() == order(gram, w).tolist()


def test_sweeps_keep_the_swept_matrix_and_undo_each_other():
    gram, w = problem(5)
    mask = mask_of([1, 4, 6])
    q, c = swept(gram, w, mask)
    done = no_pivots(q, c, 4)
    for j, on in ((2, True), (4, True), (7, False), (9, True)):
        done = pivot(q, c, done, jnp.asarray(j), jnp.asarray(on), sweeps=True)
    q_new, c_new = swept(gram, w, mask_of([1, 2, 6, 9]))
    lazy = q - (done.v.T * done.sign[None, :]) @ done.v + jnp.diag(done.shift)
    np.testing.assert_allclose(lazy, q_new, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(c - done.e @ done.v, c_new, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(done.diagonal, jnp.diagonal(q_new), rtol=1e-7)
    np.testing.assert_allclose(done.energy, jnp.sum(c_new**2, axis=0), rtol=1e-7)
    assert int(done.num) == 3


def test_scores_are_what_the_error_changes_by():
    gram, w = problem(6)
    kept = [0, 3, 8]
    scores = no_pivots(*swept(gram, w, mask_of(kept)), 1).scores
    base = brute_error(gram, w, kept)
    for j in range(P):
        other = [i for i in kept if i != j] if j in kept else [*kept, j]
        assert float(scores[j]) == pytest.approx(abs(brute_error(gram, w, other) - base), rel=1e-7)


def test_swaps_lower_the_error_to_where_no_swap_helps_and_keep_the_size():
    for seed in range(4):
        gram, w = problem(seed)
        start = columns.kept_first(jnp.zeros(P, bool))[:4]
        mask = columns.swap(gram, w, mask_of(start))
        kept = np.flatnonzero(mask)
        error = brute_error(gram, w, kept)
        assert len(kept) == 4
        assert error <= brute_error(gram, w, start) * (1 + 1e-9)
        best_add = min((j for j in range(P) if j not in kept), key=lambda j: brute_error(gram, w, [*kept, j]))
        grown = [*kept, best_add]
        assert error <= min(brute_error(gram, w, [i for i in grown if i != j]) for j in grown) * (1 + 1e-9)


def test_the_number_of_swaps_is_limited_and_the_ends_are_left_alone():
    gram, w = problem(7)
    worst = mask_of(columns.obs_order(gram, w)[-4:])
    one = columns.swap(gram, w, worst, 1)
    assert int(jnp.sum(one != worst)) == 2
    assert columns.swap(gram, w, worst, 0).tolist() == worst.tolist()
    for mask in (jnp.zeros(P, bool), jnp.ones(P, bool)):
        assert columns.swap(gram, w, mask).tolist() == mask.tolist()


def test_select_is_near_the_exhaustive_optimum_and_often_at_it():
    hits = 0
    for seed in range(6):
        gram, w = problem(seed)
        for k in (2, 5, 8):
            kept = np.flatnonzero(columns.select(gram, w, k))
            best = min(brute_error(gram, w, c) for c in combinations(range(P), k))
            assert len(kept) == k
            error = brute_error(gram, w, kept)
            assert error <= 1.25 * best
            hits += error <= best * (1 + 1e-9)
    assert hits >= 14


def test_select_beats_both_orders_and_the_columns_of_largest_norm():
    gram, w = problem(8)
    norms = jnp.argsort(-jnp.sum(w * w, axis=0) * jnp.diagonal(gram))
    for k in (2, 5, 8):
        error = columns.column_error(gram, w, columns.select(gram, w, k))
        for order in (*(f(gram, w) for f in ORDERS), norms):
            assert float(error) <= float(columns.error_curve(gram, w, order)[k]) * (1 + 1e-9)


def test_sizes_beyond_the_ends_count_as_the_ends():
    gram, w = problem(9)
    assert [int(jnp.sum(columns.select(gram, w, k))) for k in (-3, 0, P, P + 5)] == [0, 0, P, P]


def test_one_compilation_serves_every_size():
    gram, w = problem(0)
    columns.select(gram, w, 1)
    compiled = columns.select._cache_size()
    for k in range(2, P):
        columns.select(gram, w, k)
    assert columns.select._cache_size() == compiled


def test_vmap_equals_the_loop():
    problems = [problem(s) for s in (1, 2)]
    grams, ws = (jnp.stack(a) for a in zip(*problems, strict=True))
    both = jax.vmap(lambda gram, w: columns.select(gram, w, 4))(grams, ws)
    assert both.tolist() == [columns.select(gram, w, 4).tolist() for gram, w in problems]


def test_singular_gram_and_dead_inputs_give_finite_choices():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, P))
    x[:, 3] = 0
    gram, w = jnp.asarray(x.T @ x / 5), jnp.asarray(rng.normal(size=(N, P)))
    mask = columns.select(gram, w, 5)
    assert not bool(mask[3])
    assert float(columns.column_error(gram, w, mask)) <= 1e-6 * brute_error(gram, w, [])


def test_float32_agrees_with_float64():
    gram, w = problem(11)
    exact = columns.column_error(gram, w, columns.select(gram, w, 5))
    mask = columns.select(gram.astype(jnp.float32), w.astype(jnp.float32), 5)
    assert float(columns.column_error(gram, w, mask)) <= 1.05 * float(exact)


def test_group_order_is_block_elimination():
    gram, w = problem(12, p=12)
    group = np.arange(12) % 4
    order = np.asarray(columns.group_order(gram, w, group)).reshape(4, 3)
    assert all(len(set(group[members])) == 1 for members in order)
    left = list(range(4))
    for gone in group[order[::-1, 0]][:-1]:
        errors = {g: brute_error(gram, w, np.flatnonzero((group != g) & np.isin(group, left))) for g in left}
        assert errors[gone] == pytest.approx(min(errors.values()), rel=1e-7)
        left.remove(gone)


def test_select_groups_keeps_whole_groups():
    gram, w = problem(13, p=12)
    group = np.arange(12) % 4
    mask = np.asarray(columns.select_groups(gram, w, 3, group))
    assert sorted(set(group[mask])) == sorted(set(group[np.asarray(columns.group_order(gram, w, group))[:9]]))
    assert mask.sum() == 9
    assert [int(jnp.sum(columns.select_groups(gram, w, k, group))) for k in (-1, 0, 9)] == [0, 0, 12]


@pytest.mark.parametrize("group", [np.arange(9) % 3, np.array([0] * 7 + [1] * 3)])
def test_unequal_or_incomplete_groups_are_refused(group):
    gram, w = problem(14)
    with pytest.raises(ValueError, match=r"group must name the group of each of the 10 columns.*c_in"):
        columns.select_groups(gram, w, 1, group) if len(group) == P else columns._members(group, P)
