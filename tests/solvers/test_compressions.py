"""C steps: minimisers within their form, storage as encoded, sums that never get worse."""

import itertools
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers.compressions import (
    AdaptiveCodebook,
    Additive,
    Compression,
    LowRank,
    OptimalCodebook,
    PenaltyL0,
    PenaltyL1,
    PruneGroups,
    PruneL0,
    PruneL1,
    PruneNofM,
    RankSelection,
    Reshaping,
    ScaledBinary,
    ScaledTernary,
    binary,
    fixed_point,
    powers_of_two,
)
from solvers.compressions.optimal_codebook import optimal_centers
from solvers.prox import COLUMNS, ROWS, channels

SPATIAL = Reshaping("spatial", (2, 3))
# Those whose C step is the exact minimiser.
EXACT = {
    "l0": PruneL0(30),
    "l1": PruneL1(4.0),
    "l0 penalty": PenaltyL0(0.1),
    "l1 penalty": PenaltyL1(0.2),
    "columns": PruneGroups(7, COLUMNS),
    "rows": PruneGroups(3, ROWS),
    "channels": PruneGroups(2, channels(3)),
    "2 of 4": PruneNofM(2, 6),
    "optimal codebook": OptimalCodebook(4),
    "binary": binary(),
    "scaled binary": ScaledBinary(),
    "scaled ternary": ScaledTernary(),
    "fixed point": fixed_point(4, 2),
    "powers of two": powers_of_two(0, -3),
    "low rank": LowRank(2),
    "low rank, spatial": LowRank(2, SPATIAL),
    "rank selection": RankSelection(0.05),
    "rank selection, normalised": RankSelection(0.002, cost=3.0, normalize=True),
}
LOCAL = {
    "k-means": AdaptiveCodebook(4),
    "l0, float16": PruneL0(30, 16),
    "l0, codebook": PruneL0(30, 2),
    "low rank, float16": LowRank(2, SPATIAL, 16),
    "quantization + pruning": Additive((AdaptiveCodebook(2), PruneL0(12))),
    "quantization + low rank": Additive((AdaptiveCodebook(2), LowRank(1))),
    "pruning + low rank": Additive((PruneL0(12), LowRank(1))),
    "all three": Additive((PruneL0(12), LowRank(1), AdaptiveCodebook(2))),
    "low rank twice": Additive((LowRank(1), LowRank(1, SPATIAL))),
    "columns + low rank": Additive((PruneGroups(4, COLUMNS), LowRank(1))),
}
ALL = EXACT | LOCAL
MU = 1.5


def weights(seed=0, n=6, p=18):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, p)), jnp.float32)


def objective(form, target, theta):
    gap = target - form.decompress(theta)
    if getattr(form, "normalize", False):
        gap = gap / jnp.linalg.norm(target)
    return float(form.penalty(theta) + MU / 2 * jnp.sum(gap * gap))


@pytest.mark.parametrize("name", ALL)
def test_shapes_bits_and_one_compilation(name):
    form, w = ALL[name], weights()
    assert isinstance(form, Compression)
    theta = jax.jit(form.compress)(w, MU)
    assert form.decompress(theta).shape == w.shape
    assert form.encode(theta).shape == (form.bits(theta),)
    assert set(np.unique(form.encode(theta))) <= {0, 1}
    warm = form.compress(w, MU, theta)
    assert objective(form, w, warm) <= objective(form, w, theta) * (1 + 1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_no_other_theta_of_the_form_is_better(name):
    form, w, rng = EXACT[name], weights(), np.random.default_rng(1)
    best = objective(form, w, form.compress(w, MU))
    for scale in (0.03, 0.3, 1.0, 3.0):
        for _ in range(10):
            other = form.compress(w + scale * rng.normal(size=w.shape).astype(np.float32), MU)
            assert best <= objective(form, w, other) * (1 + 1e-5)


@pytest.mark.parametrize("name", [name for name, form in LOCAL.items() if isinstance(form, Additive)])
def test_more_rounds_are_never_worse(name):
    form, w = LOCAL[name], weights()
    errors = [objective(form, w, Additive(form.parts, rounds).compress(w, MU)) for rounds in (1, 2, 4, 8)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    alone = min(objective(part, w, part.compress(w, MU)) for part in form.parts)
    assert errors[-1] < alone


def test_pruning_against_all_subsets():
    w = weights(n=1, p=9).reshape(-1)
    found = PruneL0(4).compress(w, MU)
    least = min(
        float(jnp.sum(w**2)) - float(jnp.sum(w[jnp.array(s)] ** 2)) for s in itertools.combinations(range(9), 4)
    )
    assert float(jnp.sum((w - found) ** 2)) == pytest.approx(least)


def test_nothing_is_kept_when_nothing_may_be():
    assert not PruneL0(0).compress(weights(), MU).any()
    assert not PruneL1(0.0).compress(weights(), MU).any()


@pytest.mark.parametrize("form", [PenaltyL0(0.1), PenaltyL1(0.1)])
def test_penalties_keep_nothing_at_mu_zero(form):
    assert not form.compress(weights(), 0.0).any()


@pytest.mark.parametrize(("v", "kappa", "norm"), [([3, 1], 2, 2), ([5, 4, 3, 2, 1], 4, 4), ([0.5, -0.2], 2, 0.7)])
def test_the_l1_ball_is_met_exactly(v, kappa, norm):
    found = PruneL1(float(kappa)).compress(jnp.asarray(v, jnp.float32), MU)
    assert float(jnp.sum(jnp.abs(found))) == pytest.approx(norm, abs=1e-6)


def test_l1_projection_to_six_digits():
    """Against the optimality conditions: one threshold for all, active on the sphere."""
    with jax.enable_x64(True):
        v = jnp.asarray(np.random.default_rng(3).standard_normal(1000))
        found = PruneL1(20.0).compress(v, MU)
        assert float(jnp.sum(jnp.abs(found))) == pytest.approx(20.0, abs=1e-9)
        shrunk = (jnp.abs(v) - jnp.abs(found))[found != 0]
        assert float(jnp.ptp(shrunk)) < 1e-9
        assert float(jnp.max(jnp.abs(v[found == 0]))) <= float(shrunk[0]) + 1e-9


def error_of(values, centers):
    return float(np.sum(np.min((values[:, None] - centers[None, :]) ** 2, axis=1)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_optimal_codebook_against_all_partitions(seed, k):
    values = np.round(np.random.default_rng(seed).normal(size=10), 1)  # with repetitions
    ordered, least = np.sort(values), np.inf
    for cuts in itertools.combinations(range(1, 10), k - 1):
        parts = np.split(ordered, cuts)
        least = min(least, sum(float(np.sum((part - part.mean()) ** 2)) for part in parts))
    assert error_of(values, optimal_centers(values, k)) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("k", [2, 5, 16])
def test_k_means_never_beats_the_optimum_and_comes_near(k):
    values = np.random.default_rng(k).standard_t(3, size=4000).astype(np.float32)
    best = error_of(values, optimal_centers(values, k))
    form = AdaptiveCodebook(k)
    found = error_of(values, np.asarray(form.compress(jnp.asarray(values), MU).centers))
    assert best <= found * (1 + 1e-6)
    assert found < 1.1 * best


def test_a_million_weights():
    values = np.random.default_rng(0).normal(size=10**6).astype(np.float32)
    start = perf_counter()
    centers = optimal_centers(values, 4)
    assert perf_counter() - start < 20
    np.testing.assert_allclose(centers, -centers[::-1], atol=0.02)
    warm = AdaptiveCodebook(4).compress(jnp.asarray(values), MU)
    np.testing.assert_allclose(warm.centers, centers, atol=5e-3)


def test_fewer_values_than_centers():
    np.testing.assert_array_equal(optimal_centers(np.array([2.0, 1.0, 2.0]), 3), [1, 2, 2])


def test_ternary_against_all_signs():
    w = weights(n=1, p=6).reshape(-1)
    best = float(jnp.sum((w - ScaledTernary().decompress(ScaledTernary().compress(w, MU))) ** 2))
    for signs in itertools.product((-1, 0, 1), repeat=6):
        if any(signs):
            s = np.array(signs)
            c = max(float(np.asarray(w) @ s) / float(s @ s), 0)
            assert best <= float(np.sum((np.asarray(w) - c * s) ** 2)) + 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.05, 0.3, 10.0])
def test_selected_rank_against_all_ranks(alpha):
    w = weights()
    found = objective(RankSelection(alpha), w, RankSelection(alpha).compress(w, MU))
    s = np.linalg.svd(np.asarray(w), compute_uv=False)
    every = [alpha * r * 24 + MU / 2 * float(np.sum(s[r:] ** 2)) for r in range(7)]
    assert found == pytest.approx(min(every), rel=1e-4, abs=1e-5)


def test_reshapings_are_undone():
    w = weights()
    for reshaping in (Reshaping(), SPATIAL):
        np.testing.assert_array_equal(reshaping.undo(reshaping.apply(w)), w)
    assert SPATIAL.apply(w).shape == (12, 9)


BAD = [
    (lambda: PruneL0(-1), "kappa: -1"),
    (lambda: PruneL0(200).compress(weights(), MU), "kappa: 200 of 108"),
    (lambda: PruneL0(3, 12), "precision: 12"),
    (lambda: PruneL1(-1.0), "kappa: -1"),
    (lambda: PenaltyL1(float("nan")), "alpha: nan"),
    (lambda: PruneGroups(19).compress(weights(), MU), "kappa: 19 of 18"),
    (lambda: PruneNofM(5, 4), "n, m: 5 of 4"),
    (lambda: PruneNofM(2, 4).compress(weights(), MU), "m: 4 does not divide"),
    (lambda: AdaptiveCodebook(0), "k: 0"),
    (lambda: OptimalCodebook(200).compress(weights(), MU), "k: 200 values for 108"),
    (lambda: fixed_point(0, 1), "bits: 0"),
    (lambda: powers_of_two(-3, 0), "smallest, largest"),
    (lambda: LowRank(7).compress(weights(), MU), r"rank: 7 of a \(6, 18\) matrix"),
    (lambda: LowRank(1, value_bits=8), "value_bits: 8"),
    (lambda: RankSelection(-1.0), "alpha: -1"),
    (lambda: Reshaping("columns"), "scheme: 'columns'"),
    (lambda: Reshaping("spatial"), "needs the"),
    (lambda: Additive((PruneL0(1),)), "parts: 1"),
    (lambda: Additive((PruneL0(1), PruneL0(2)), 0), "rounds: 0"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
