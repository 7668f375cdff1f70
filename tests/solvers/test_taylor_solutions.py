"""Compression under a diagonal model, against every alternative there is."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from solvers.compressions import (
    AdaptiveCodebook,
    Additive,
    FixedCodebook,
    LowRank,
    OneOf,
    OptimalCodebook,
    PenaltyL0,
    PruneGroups,
    PruneL0,
    PruneNofM,
    ScaledBinary,
    ScaledTernary,
    binary,
)
from solvers.compressions.optimal_codebook import optimal_centers
from solvers.prox import COLUMNS
from solvers.taylor import Taylor
from solvers.taylor_solutions import SOLUTIONS, is_solvable, solve


def model_of(d=12, seed=0, gradient=0.2, shape=None):
    rng = np.random.default_rng(seed)
    w, g, h = rng.normal(size=d), gradient * rng.normal(size=d), rng.uniform(0.05, 2, size=d) ** 2
    return Taylor(*(jnp.asarray(a.reshape(shape or (d,))) for a in (w, g, h)))


def loss(form, model):
    theta = solve(form, model)
    return float(model.value(form.decompress(theta).astype(model.w.dtype)) + form.penalty(theta).astype(model.w.dtype))


def each(model, x):
    """Value of every weight by itself, in NumPy."""
    w, g, h = (np.asarray(a) for a in (model.w, model.g, model.h))
    return g * (x - w) + h / 2 * (x - w) ** 2


@pytest.mark.parametrize("gradient", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("kappa", [0, 1, 5, 12])
def test_pruning_against_all_supports(kappa, gradient):
    """All 2^12 sets of at most kappa weights, each set at its own minimum."""
    model = model_of(gradient=gradient)
    w, g, h = (np.asarray(a) for a in (model.w, model.g, model.h))
    kept, dropped = each(model, w - g / h), each(model, np.zeros(12))
    supports = np.array(list(itertools.product((False, True), repeat=12)))
    values = np.where(supports, kept, dropped).sum(axis=1)
    best = values[supports.sum(axis=1) <= kappa].min()
    assert loss(PruneL0(kappa), model) == pytest.approx(best)
    theta = solve(PruneL0(kappa), model)
    np.testing.assert_allclose(theta[theta != 0], (w - g / h)[np.asarray(theta != 0)])
    if gradient == 0 and 0 < kappa < 12:  # optimal brain damage
        assert set(np.flatnonzero(theta)) == set(np.argsort(-h * w**2)[:kappa])


def test_pruning_flat_weights_against_all_supports():
    """Flat ones stay where they are or go to 0: no gain is claimed for moving them."""
    w, g, h = [1.0, 2.0, -1.0, 3.0], [0.1, -0.4, -0.2, 0.3], [1.0, 0.0, -0.5, 0.2]
    model = Taylor(*map(jnp.array, (w, g, h)))
    kept, dropped = each(model, np.asarray(model.minimum())), each(model, np.zeros(4))
    for kappa in range(5):
        supports = [s for s in itertools.product((False, True), repeat=4) if sum(s) <= kappa]
        best = min(np.where(s, kept, dropped).sum() for s in supports)
        assert loss(PruneL0(kappa), model) == pytest.approx(best)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.5])
def test_the_penalty_of_a_weight_against_all_supports(alpha):
    model = model_of()
    kept, dropped = each(model, np.asarray(model.minimum())), each(model, np.zeros(12))
    assert loss(PenaltyL0(alpha), model) == pytest.approx(np.minimum(kept + alpha, dropped).sum())


def test_groups_and_blocks_against_all_supports():
    model = model_of(shape=(3, 4))
    kept, dropped = each(model, np.asarray(model.minimum())), each(model, np.zeros((3, 4)))
    columns = [np.isin(np.arange(4), s)[None, :] for s in itertools.combinations(range(4), 2)]
    best = min(np.where(s, kept, dropped).sum() for s in columns)
    assert loss(PruneGroups(2, COLUMNS), model) == pytest.approx(best)
    pairs = [np.isin(np.arange(4), s) for s in itertools.combinations(range(4), 2)]
    best = sum(min(np.where(s, k, d).sum() for s in pairs) for k, d in zip(kept, dropped, strict=True))
    assert loss(PruneNofM(2, 4), model) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gradient", [0.0, 2.0])
def test_binarization_against_all_signs(seed, gradient):
    model = model_of(seed=seed, gradient=gradient)
    w, g, h = (np.asarray(a) for a in (model.w, model.g, model.h))
    signs = np.array(list(itertools.product((-1, 1), repeat=12)))
    scales = np.maximum(signs @ (h * w - g), 0) / h.sum()  # the minimum of a parabola in c >= 0
    values = each(model, scales[:, None] * signs).sum(axis=1)
    assert loss(ScaledBinary(), model) == pytest.approx(values.min())
    assert loss(binary(), model) == pytest.approx(each(model, signs).sum(axis=1).min())


@pytest.mark.parametrize("seed", range(3))
def test_ternarization_against_all_signs(seed):
    model = model_of(d=8, seed=seed)
    w, g, h = (np.asarray(a) for a in (model.w, model.g, model.h))
    signs = np.array([s for s in itertools.product((-1, 0, 1), repeat=8) if any(s)])
    scales = np.maximum(signs @ (h * w - g), 0) / (np.abs(signs) @ h)
    best = each(model, scales[:, None] * signs).sum(axis=1).min()
    assert loss(ScaledTernary(), model) == pytest.approx(min(best, each(model, np.zeros(8)).sum()))


def test_a_fixed_codebook_against_all_values():
    model, values = model_of(), (-1.0, -0.25, 0.0, 0.5)
    best = np.min([each(model, np.full(12, v)) for v in values], axis=0).sum()
    assert loss(FixedCodebook(values), model) == pytest.approx(best)


def weighted_error(values, weights, centers):
    return float(np.sum(weights * np.min((values[:, None] - centers[None, :]) ** 2, axis=1)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_weighted_codebooks_against_all_partitions(seed, k):
    rng = np.random.default_rng(seed)
    values = np.round(rng.normal(size=10), 1)  # with repetitions
    weights = rng.uniform(size=10) ** 3 * (rng.uniform(size=10) > 0.2)  # and zeros
    order = np.argsort(values)
    ordered, own = values[order], weights[order]
    least = np.inf
    for cuts in itertools.combinations(range(1, 10), k - 1):
        parts = zip(np.split(ordered, cuts), np.split(own, cuts), strict=True)
        least = min(least, sum(np.sum(q * (v - np.sum(q * v) / max(np.sum(q), 1e-300)) ** 2) for v, q in parts))
    centers = optimal_centers(values, k, weights)
    assert weighted_error(values, weights, centers) == pytest.approx(least, abs=1e-12)
    assert (np.diff(centers) >= 0).all()
    np.testing.assert_allclose(optimal_centers(values, k, np.full(10, 3.0)), optimal_centers(values, k), atol=1e-12)


@pytest.mark.parametrize("form", [AdaptiveCodebook(3), OptimalCodebook(3)])
def test_quantization_against_all_partitions_of_the_minima(form):
    model = model_of(d=9)
    points, h = (np.asarray(a) for a in (model.minimum(), model.h))
    order, least = np.argsort(points), np.inf
    for cuts in itertools.combinations(range(1, 9), 2):
        parts = np.split(order, cuts)
        least = min(least, sum(h[i] @ (points[i] - np.average(points[i], weights=h[i])) ** 2 / 2 for i in parts))
    assert loss(form, model) - float(model.value(model.minimum())) == pytest.approx(least)


def test_many_weights_have_many_centers():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=20_000), rng.uniform(size=20_000) ** 4
    errors = [weighted_error(values, weights, optimal_centers(values, k, weights)) for k in (1, 2, 3, 5, 8)]
    assert all(b < 0.75 * a for a, b in itertools.pairwise(errors))
    blind = weighted_error(values, weights, optimal_centers(values, 5))
    assert errors[3] <= blind


def test_without_any_curvature_all_weights_count_alike():
    flat = Taylor(model_of().w, jnp.zeros(12), jnp.zeros(12))
    for form in (OptimalCodebook(3), ScaledBinary(), ScaledTernary()):
        np.testing.assert_allclose(
            form.decompress(solve(form, flat)), form.decompress(form.compress(flat.w, 0.0)), rtol=1e-6
        )


def test_sums_never_get_worse_with_more_rounds():
    model = model_of(d=40)
    parts = (OptimalCodebook(2), PruneL0(5))
    losses = [loss(Additive(parts, rounds), model) for rounds in (1, 2, 4, 8)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))
    assert losses[-1] < min(loss(part, model) for part in parts)


def test_the_better_of_two_forms_is_chosen():
    model = model_of()
    parts = (ScaledBinary(), OptimalCodebook(3))
    losses = [loss(part, model) for part in parts]
    for order in (parts, parts[::-1]):
        assert loss(OneOf(order), model) == pytest.approx(min(losses))


def test_which_forms_have_a_solution():
    assert all(hasattr(form, "compress") for form in SOLUTIONS)
    assert is_solvable(Additive((PruneL0(1), OptimalCodebook(2))))
    assert not is_solvable(Additive((PruneL0(1), LowRank(2))))
    assert not is_solvable(PruneL0(3, 16))
    for form, message in (
        (LowRank(1), "no solution"),
        (PruneL0(13), "kappa: 13 of 12"),
        (OptimalCodebook(13), "k: 13"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(form, model_of())
    with pytest.raises(ValueError, match="kappa: 5 of 4 columns"):
        solve(PruneGroups(5, COLUMNS), model_of(shape=(3, 4)))


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, np.inf], [np.nan, 1.0]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights: negative"):
        optimal_centers(np.array([1.0, 2.0]), 1, np.array(weights))
