"""C steps: minimisers within their form, storage as encoded, sums that never get worse."""

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers.compressions import (
    AdaptiveCodebook,
    Additive,
    Codebook,
    Compression,
    Cp,
    Each,
    FixedCodebook,
    Half,
    LowRank,
    OneOf,
    OptimalCodebook,
    PenaltyGroups,
    PenaltyL0,
    PenaltyL1,
    PenaltyNuclear,
    PruneBelow,
    PruneGroups,
    PruneL0,
    PruneL1,
    PruneNofM,
    PruneQuantize,
    RankSelection,
    ScaledBinary,
    ScaledTernary,
    Tucker2,
    binary,
    fixed_point,
    k_means,
    optimal_codebook,
    powers_of_two,
)
from solvers.compressions.base import objective
from solvers.compressions.bits import Reader, position_bits, read_positions, write_positions
from solvers.compressions.optimal_codebook import optimal_centers
from solvers.compressions.pruning import largest
from solvers.compressions.spec import from_spec, is_known, to_spec
from solvers.prox import CHANNELS, COLUMNS, ROWS
from solvers.terms import MatrixShape, total_matrix

LAYER = MatrixShape((2, 3), 3, 6)  # a (6, 18) matrix
BIAS = MatrixShape((), 6, 1)
# Those whose C step is the exact minimiser.
EXACT = {
    "l0": PruneL0(30),
    "l0, a fraction": PruneL0(0.25),
    "l1": PruneL1(4.0),
    "l0 penalty": PenaltyL0(0.1),
    "l1 penalty": PenaltyL1(0.2),
    "columns": PruneGroups(7, COLUMNS),
    "rows": PruneGroups(3, ROWS),
    "channels": PruneGroups(2, CHANNELS),
    "column norms": PenaltyGroups(2.5, COLUMNS),
    "channel norms": PenaltyGroups(4.0, CHANNELS),
    "2 of 6": PruneNofM(2, 6),
    "optimal codebook": OptimalCodebook(4),
    "float16": Half(),
    "binary": binary(),
    "scaled binary": ScaledBinary(),
    "scaled ternary": ScaledTernary(),
    "fixed point": fixed_point(4, 2),
    "powers of two": powers_of_two(0, -3),
    "low rank": LowRank(2),
    "low rank, spatial": LowRank(2, "spatial"),
    "low rank, auto": LowRank(2, "auto"),
    "nuclear norm": PenaltyNuclear(3.0),
    "nuclear norm, spatial": PenaltyNuclear(2.0, "spatial"),
    "rank selection": RankSelection(0.05),
    "rank selection, dense": RankSelection(0.001),
    "rank selection, multiply-adds": RankSelection(0.02, (3.0, 1.5), "spatial"),
    "rank selection, auto": RankSelection(0.05, scheme="auto"),
    "one of two": OneOf((PruneL0(30), LowRank(2))),
    "layers one by one": Each((PruneL0(0.5), OptimalCodebook(2))),
}
LOCAL = {
    "k-means": AdaptiveCodebook(4),
    "k-means, linear start": AdaptiveCodebook(4, init="linear"),
    "k-means, random start": AdaptiveCodebook(4, init="random"),
    "k-means, density start": AdaptiveCodebook(4, init="density"),
    "above one standard deviation": PruneBelow(1.0),
    "l0, float16": PruneL0(30, 16),
    "l0, codebook": PruneQuantize(30, 4),
    "low rank, float16": LowRank(2, "spatial", value_bits=16),
    "rank selection, float16": RankSelection(0.001, value_bits=16),
    "Tucker-2": Tucker2((3, 2)),
    "CP, 3-way": Cp(4),
    "CP, 4-way": Cp(4, separable=True),
}
SUMS = {
    "quantization + pruning": Additive((AdaptiveCodebook(2), PruneL0(12))),
    "quantization + low rank": Additive((AdaptiveCodebook(2), LowRank(1))),
    "pruning + low rank": Additive((PruneL0(12), LowRank(1))),
    "all three": Additive((PruneL0(12), LowRank(1), AdaptiveCodebook(2))),
    "low rank twice": Additive((LowRank(1), LowRank(1, "spatial"))),
    "columns + low rank": Additive((PruneGroups(4, COLUMNS), LowRank(1))),
    "column norms + nuclear norm": Additive((PenaltyGroups(2.0), PenaltyNuclear(4.0))),
}
JOINT = {
    "one codebook + low rank of each layer": Additive((AdaptiveCodebook(2), Each((LowRank(1),)))),
    "layers one by one": EXACT.pop("layers one by one"),
}
MU = 1.5


def weights(seed=0, n=6, p=18):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, p)), jnp.float32)


def bound(name, target=None):
    """The form of that name, for one convolution; those of `JOINT` for two dense layers."""
    target = weights() if target is None else target
    if name in JOINT:
        return JOINT[name].bind(target.reshape(-1), (MatrixShape((), 9, 6), MatrixShape((), 6, 9))), target.reshape(-1)
    return (EXACT | LOCAL | SUMS)[name].bind(target, (LAYER,)), target


def value(form, target, theta):
    return float(objective(form, theta, target, MU))


@pytest.mark.parametrize("name", [*EXACT, *LOCAL, *SUMS, *JOINT])
def test_contract(name):
    """Shapes; theta keeps its structure; bits by formula are those of the encoding, from which theta comes back."""
    form, w = bound(name)
    compress = jax.jit(form.compress)
    theta = compress(w, MU)
    assert isinstance(form, Compression)
    assert hash(form) is not None
    assert form.decompress(theta).shape == w.shape
    warm = compress(w, MU, theta)
    for a, b in zip(jax.tree.leaves(theta), jax.tree.leaves(warm), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert value(form, w, warm) <= value(form, w, theta) * (1 + 1e-5)
    bits = form.encode(theta)
    assert bits.shape == (form.bits(theta),)
    assert set(np.unique(bits)) <= {0, 1}
    reader = Reader(bits)
    read = form.decode(reader, w.shape)
    assert reader.left == 0
    np.testing.assert_array_equal(form.decompress(read), form.decompress(theta))
    assert jax.tree.structure(read) == jax.tree.structure(theta)
    np.testing.assert_array_equal(form.encode(read), bits)
    assert isinstance(form.info(theta), dict)


@pytest.mark.parametrize("name", [*EXACT, *LOCAL, *SUMS, *JOINT])
def test_a_form_is_read_back_from_json(name):
    form = bound(name)[0]
    assert is_known(form)
    assert from_spec(json.loads(json.dumps(to_spec(form)))) == form


@pytest.mark.parametrize("name", EXACT)
def test_no_other_theta_of_the_form_is_better(name):
    form, w = bound(name)
    rng, compress = np.random.default_rng(1), jax.jit(form.compress)
    best = value(form, w, compress(w, MU))
    for scale in (0.03, 0.3, 1.0, 3.0):
        for _ in range(10):
            other = compress(w + scale * rng.normal(size=w.shape).astype(np.float32), MU)
            assert best <= value(form, w, other) * (1 + 1e-5)


@pytest.mark.parametrize("name", SUMS)
def test_a_round_is_never_worse_and_a_sum_beats_its_parts(name):
    form, w = bound(name)
    a_round = jax.jit(Additive(form.parts, 1).compress)
    theta = a_round(w, MU)
    errors = [value(form, w, theta)]
    for _ in range(7):
        theta = a_round(w, MU, theta)
        errors.append(value(form, w, theta))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] < min(value(part, w, part.compress(w, MU)) for part in form.parts)


TERMS = {
    "columns": MU,
    "channels": MU,
    "column norms": 1.0,
    "low rank": MU,
    "low rank, spatial": MU,
    "nuclear norm": 0.7,
    "Tucker-2": MU,
    "CP, 3-way": MU,
    "CP, 4-way": MU,
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("plus", [None, "low rank"])
def test_terms_are_the_weights_in_fewer_values(name, plus):
    single, w = bound(name)
    form = single if plus is None else Additive((single, bound(plus)[0]))
    theta = form.compress(w, TERMS[name])
    terms = form.terms(theta, LAYER)
    if sum(t.num_params for t in terms or ()) or plus is None:
        np.testing.assert_allclose(total_matrix(terms, LAYER), form.decompress(theta), atol=1e-5)
        assert sum(term.num_params for term in terms) < w.size


def test_no_terms_where_the_dense_layer_is_smaller():
    w = weights()
    assert LowRank(5).terms(LowRank(5).compress(w, MU), LAYER) is None
    assert PruneL0(3).terms(PruneL0(3).compress(w, MU), LAYER) is None
    assert PruneGroups(3, ROWS).terms(PruneGroups(3, ROWS).compress(w, MU), LAYER) is None


def test_pruning_against_all_subsets():
    w = weights(n=1, p=9).reshape(-1)
    found = PruneL0(4).compress(w, MU)
    least = min(
        float(jnp.sum(w**2)) - float(jnp.sum(w[jnp.array(s)] ** 2)) for s in itertools.combinations(range(9), 4)
    )
    assert float(jnp.sum((w - found) ** 2)) == pytest.approx(least)


@pytest.mark.parametrize("count", [0, 1, 3, 7, 10])
def test_of_equal_weights_the_first_are_kept(count):
    w = jnp.asarray([2.0, -1.0, 1.0, 0.0, -2.0, 1.0, 0.0, -0.0, 3.0, 1.0], jnp.float32)
    expected = np.zeros(10, bool)
    expected[np.argsort(-np.abs(np.asarray(w)), kind="stable")[:count]] = True
    np.testing.assert_array_equal(largest(w, count), expected)


def test_nothing_is_kept_when_nothing_may_be():
    assert not PruneL0(0).compress(weights(), MU).any()
    assert not PruneL1(0.0).compress(weights(), MU).any()


@pytest.mark.parametrize("form", [PenaltyL0(0.1), PenaltyL1(0.1)])
def test_penalties_keep_nothing_at_mu_zero(form):
    assert not form.compress(weights(), 0.0).any()


@pytest.mark.parametrize("form", [PenaltyL0(0.0), PenaltyL1(0.0), PenaltyGroups(0.0), PenaltyNuclear(0.0)])
@pytest.mark.parametrize("mu", [0.0, MU])
def test_penalties_of_no_price_keep_everything(form, mu):
    w = weights()
    np.testing.assert_allclose(form.decompress(form.compress(w, mu)), w, atol=1e-5)


def test_a_sum_is_compressed_directly_as_well_as_later():
    """At mu = 0 constraints cost nothing, but the rounds go on as long as the distance falls."""
    w, form = weights(), bound("quantization + pruning")[0]
    gaps = [float(jnp.sum((w - form.decompress(form.compress(w, mu))) ** 2)) for mu in (0.0, MU)]
    assert gaps[0] == pytest.approx(gaps[1])
    few = Additive(form.parts, 2)
    assert gaps[0] < 0.999 * float(jnp.sum((w - few.decompress(few.compress(w, 0.0))) ** 2))


def test_the_nearest_of_several_forms_is_chosen_directly():
    w = weights()
    for parts in ((PruneL0(3), PruneL0(60)), (PruneL0(60), PruneL0(3))):
        form = OneOf(parts)
        assert int(jnp.count_nonzero(form.decompress(form.compress(w, 0.0)))) == 60


def test_what_is_too_large_for_float16_becomes_its_largest_number():
    """Weights that grow after the first step: an infinity would spoil the run."""
    found = Half().compress(jnp.asarray([1e6, -1e6, 1.0], jnp.float32), MU)
    np.testing.assert_array_equal(found, [65504, -65504, 1])


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


@pytest.mark.parametrize("share", [1e-5, 0.01, 0.3, 0.9])
def test_the_l1_ball_of_a_million_float32_weights(share):
    v = np.random.default_rng(4).standard_normal(10**6).astype(np.float32)
    kappa = share * float(np.sum(np.abs(v), dtype=np.float64))
    found = np.asarray(jax.jit(PruneL1(kappa).compress)(jnp.asarray(v), MU), np.float64)
    assert np.sum(np.abs(found)) == pytest.approx(kappa, rel=1e-6)
    shrunk = (np.abs(v) - np.abs(found))[found != 0]
    assert np.ptp(shrunk) < 1e-6
    assert np.max(np.abs(v[found == 0])) <= shrunk.min() + 1e-6


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_positions_are_read_back(share):
    kept = np.random.default_rng(5).uniform(size=3000) < share
    bits = write_positions(kept)
    assert len(bits) == position_bits(kept)
    np.testing.assert_array_equal(read_positions(Reader(bits), 3000), kept)
    with pytest.raises(ValueError, match="damaged"):
        read_positions(Reader(bits[:-1] if len(bits) > 37 else bits[:30]), 3000)


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
    centers = optimal_centers(values, 16)
    assert perf_counter() - start < 10
    np.testing.assert_allclose(centers, -centers[::-1], atol=0.02)
    warm = AdaptiveCodebook(16).compress(jnp.asarray(values), MU)
    assert error_of(values, centers) <= error_of(values, np.asarray(warm.centers)) * (1 + 1e-6)


@pytest.mark.parametrize("k", [2, 6, 17])
def test_bounds_rule_out_no_optimum(monkeypatch, k):
    rng = np.random.default_rng(k)
    values = np.concatenate([rng.standard_t(2, size=1500), rng.normal(3, 0.01, size=500)])
    narrow = optimal_centers(values, k)
    everywhere = lambda costs, k: [optimal_codebook._Window(m, 2000 - k + m) for m in range(1, k)]  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(optimal_codebook, "_windows", everywhere)
        np.testing.assert_allclose(optimal_centers(values, k), narrow, rtol=1e-9)
    for size in (4, 20):
        monkeypatch.setattr(optimal_codebook, "_GRID", size)
        np.testing.assert_allclose(optimal_centers(values, k), narrow, rtol=1e-9)


def test_weighted_values_are_repeated_values():
    rng = np.random.default_rng(2)
    values, counts = rng.normal(size=60), rng.integers(0, 4, size=60)
    repeated = optimal_centers(np.repeat(values, counts), 5)
    np.testing.assert_allclose(optimal_centers(values, 5, counts.astype(float)), repeated, rtol=1e-12)
    with pytest.raises(ValueError, match="weights: negative"):
        optimal_centers(values, 5, -counts.astype(float))


def test_a_cluster_of_few_values_far_out_is_exact():
    """Plain float32 prefix sums of the million others would be wrong by more than the cluster is wide."""
    with jax.enable_x64(False):
        values = np.random.default_rng(0).normal(size=10**6).astype(np.float32)
        values[:3] = [100.0, 100.25, 100.75]
        found = AdaptiveCodebook(2).compress(jnp.asarray(values), MU, Codebook(jnp.asarray([0.0, 100.0]), jnp.zeros(1)))
        assert float(found.centers[1]) == pytest.approx(100.0 + 1 / 3, abs=1e-5)


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
@pytest.mark.parametrize("cost", [1.0, (1.0, 2.0)])
def test_selected_rank_against_all_ranks_and_dense(alpha, cost):
    w, form = weights(), RankSelection(alpha, cost)
    found = value(form, w, form.compress(w, MU))
    s = np.linalg.svd(np.asarray(w), compute_uv=False)
    u, v = cost if isinstance(cost, tuple) else (cost, cost)
    every = [alpha * r * (6 * u + 18 * v) + MU / 2 * float(np.sum(s[r:] ** 2)) for r in range(6)]
    assert found == pytest.approx(min(*every, alpha * 108 * u), rel=1e-4, abs=1e-5)


def test_the_rank_is_full_at_mu_zero_and_1_at_the_suggested_mu():
    w, form = weights(), RankSelection(0.3)
    np.testing.assert_array_equal(form.decompress(form.compress(w, 0.0)), w)
    assert int(form.compress(w, form.suggested_mu(w) * 0.99).rank) == 0
    assert int(form.compress(w, form.suggested_mu(w) * 1.01).rank) >= 1
    told = form.info(form.compress(w, 0.0))
    assert told["suggested_mu"] == pytest.approx(form.suggested_mu(w), rel=1e-5)
    np.testing.assert_allclose(told["singular_values"], np.linalg.svd(np.asarray(w), compute_uv=False), rtol=1e-4)
    assert form.info(form.compress(w, form.suggested_mu(w) * 0.99)) == {"rank": 0}
    assert form.info(form.compress(jnp.zeros_like(w), 0.0))["suggested_mu"] is None


def test_schemes():
    bind = lambda form, layer=LAYER: form.bind(jnp.zeros((layer.n, layer.p)), (layer,))  # noqa: E731
    assert bind(LowRank(2, "auto")).reshaping.shape((6, 18)) == (12, 9)  # 21 values a rank, not 24
    assert bind(LowRank(2, "auto"), MatrixShape((), 18, 6)).scheme == "rows"
    assert bind(LowRank(2, "auto"), MatrixShape((1, 3), 6, 6)).scheme == "rows"
    assert bind(RankSelection(0.1, scheme="auto"), MatrixShape((), 18, 6)).scheme == "rows"
    kernel = weights().T.reshape(2, 3, 3, 6)  # (i, j, c, o)
    matrix = bind(LowRank(2, "spatial")).reshaping.apply(weights())
    np.testing.assert_array_equal(matrix, jnp.transpose(kernel, (3, 0, 1, 2)).reshape(12, 9))


def test_a_form_of_ones_own_needs_five_methods():
    @dataclass(frozen=True)
    class Nothing(Compression):
        def compress(self, target, mu, start=None):
            return jnp.zeros_like(target)

        def decompress(self, theta):
            return theta

        def bits(self, theta):
            return 0

        def encode(self, theta):
            return np.zeros(0, np.uint8)

        def decode(self, reader, shape):
            return jnp.zeros(shape)

    form = Additive((Nothing(), PruneL0(12)))
    theta = form.bind(weights(), (LAYER,)).compress(weights(), MU)
    assert form.bits(theta) == PruneL0(12).bits(theta[1])
    assert float(form.penalty(theta)) == 0
    assert not is_known(form)


# What LC-model-compression (bf12c3c) gets wrong.


def test_low_rank_of_full_rank_is_the_matrix():
    """It returns nothing where the rank is not reduced."""
    w = weights()
    np.testing.assert_allclose(LowRank(6).decompress(LowRank(6).compress(w, MU)), w, atol=1e-5)


def test_bits_count_precision_first_gap_and_each_value_once():
    """It ignores the precision, drops the first gap, and counts every assignment as a parameter."""
    w = weights()
    count = lambda form: form.bits(form.compress(w, MU))  # noqa: E731
    assert count(PruneL0(30)) - count(PruneL0(30, 16)) == 16 * 30
    assert count(LowRank(2)) - count(LowRank(2, value_bits=16)) == 16 * 2 * 24
    assert count(AdaptiveCodebook(4)) == 2 * 108 + 4 * 32
    first, second = jnp.zeros(50).at[40].set(1.0), jnp.zeros(50).at[0].set(1.0)
    form = PruneL0(1)
    for theta in (first, second):
        np.testing.assert_array_equal(form.decode(Reader(form.encode(theta)), (50,)), theta)


def test_layers_one_by_one_count_their_bits():
    """Its mapper has no count methods and cannot be made."""
    form, w = bound("layers one by one")
    theta = form.compress(w, MU)
    own = [part.bits(each) for part, each in zip(form.parts, theta, strict=True)]
    assert form.bits(theta) == sum(own)


@pytest.mark.parametrize("form", [ScaledTernary(), ScaledBinary(), AdaptiveCodebook(3)])
def test_a_vector_of_several_layers_stays_a_vector(form):
    """It returns (1, N) for ternary weights."""
    w = weights().reshape(-1)
    assert form.decompress(form.compress(w, MU)).shape == w.shape


@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 0.01, 0.03, 0.1])
def test_no_rank_above_break_even(alpha):
    """It never compares with the dense matrix. Here 24 r < 108 only up to rank 4."""
    form = RankSelection(alpha)
    theta = form.compress(weights(), MU)
    assert int(theta.rank) in (0, 1, 2, 3, 4, 6)
    assert form.bits(theta) <= 3 + 32 * 108


def test_what_is_below_the_threshold_goes():
    w = weights()
    found = PruneBelow(1.5).compress(w, MU)
    np.testing.assert_array_equal(found != 0, np.abs(w) > 1.5 * np.std(w))
    bound = PruneBelow(1.5).bind(w, (LAYER,))
    assert bound == PruneL0(int(np.count_nonzero(found)))
    np.testing.assert_array_equal(bound.compress(w, MU), found)


@pytest.mark.parametrize("init", ["linear", "random", "density"])
def test_every_start_of_k_means_ends_where_nothing_changes(init):
    w = weights().reshape(-1)
    centers = AdaptiveCodebook(5, init=init).compress(w, MU).centers
    nearest = np.argmin(np.abs(np.asarray(w)[:, None] - np.asarray(centers)), axis=1)
    for i, center in enumerate(centers):
        np.testing.assert_allclose(w[nearest == i].mean(), center, rtol=1e-6)


def test_starts_of_k_means_are_those_of_their_names():
    """On values of a far outlier equal steps put one center there alone; equal shares do not."""
    w = jnp.concatenate([jnp.linspace(0.0, 1.0, 99), jnp.asarray([100.0])])
    codes = {init: AdaptiveCodebook(2, init=init).compress(w, MU).codes for init in ("linear", "density")}
    assert int(jnp.sum(codes["linear"] == 1)) == 1
    line = k_means.sort_line(w)
    np.testing.assert_array_equal(k_means._evenly(line, 2), w[np.array([25, 75])])


def bind(form, n=6):
    return form.bind(weights(n=n), (LAYER,))


BAD = [
    (lambda: PruneL0(-1), "kappa: -1"),
    (lambda: PruneL0(1.5), "kappa: 1.5 is no number of weights"),
    (lambda: bind(PruneL0(200)), "kappa: 200 of 108"),
    (lambda: PruneL0(3, 12), "precision: 12"),
    (lambda: bind(PruneBelow(9.0)), "quality: 9; the largest weight is"),
    (lambda: PruneBelow(-1.0), "quality: -1"),
    (lambda: AdaptiveCodebook(4, init="even"), "init: 'even' is unknown; choose one of k-means"),
    (lambda: PruneQuantize(4, 4, init="even"), "init: 'even'"),
    (lambda: PruneL1(-1.0), "kappa: -1"),
    (lambda: PenaltyL1(float("nan")), "alpha: nan"),
    (lambda: PenaltyGroups(-1.0), "alpha: -1"),
    (lambda: bind(PruneGroups(19)), "kappa: 19 of 18"),
    (lambda: PruneGroups(2, CHANNELS).bind(weights(), (LAYER, LAYER)), "channels needs .* a vector of 2 layers"),
    (lambda: PruneGroups(2).bind(jnp.ones(36), (LAYER, LAYER)), "columns needs one matrix, not a vector of 2 layers"),
    (lambda: PruneGroups(2).bind(jnp.ones(6), (BIAS,)), "a vector of 6 numbers such as a bias; name the layer"),
    (lambda: PenaltyGroups(2.0).bind(jnp.ones(6), (BIAS,)), "columns needs one matrix, not a vector of 6 numbers"),
    (lambda: LowRank(1).bind(jnp.ones(6), (BIAS,)), "low rank needs one matrix, not .* a bias; name the layer"),
    (lambda: PruneNofM(0, 4), "n: 0"),
    (lambda: FixedCodebook((0.0, float("nan"))), "values: nan is no finite number"),
    (lambda: RankSelection(float("inf")), "alpha: inf; give a finite number"),
    (lambda: PruneBelow(1.0).bind(jnp.zeros(4), ()), "quality: all weights are zero"),
    (lambda: Half().bind(jnp.asarray([1.0, -7e4]), ()), "the largest weight is 70000, the format ends at 65504"),
    (lambda: PruneL0(1, 16).bind(jnp.asarray([1.0, -7e4]), ()), "the largest weight is 70000"),
    (lambda: LowRank(1, value_bits=16).bind(1e5 * weights(), (LAYER,)), "float16: the largest weight is"),
    (lambda: RankSelection(1.0, value_bits=16).bind(1e5 * weights(), (LAYER,)), "float16: the largest weight is"),
    (lambda: bind(PruneQuantize(3, 4)), "k: 4 values for 3 weights that stay"),
    (lambda: PruneNofM(5, 4), "n, m: 5 of 4"),
    (lambda: bind(PruneNofM(2, 4)), "m: 4 does not divide"),
    (lambda: AdaptiveCodebook(0), "k: 0"),
    (lambda: bind(OptimalCodebook(200)), "k: 200 values for 108"),
    (lambda: PruneQuantize(3, 3).bind(jnp.asarray([1.0, 2.0, 1.0, 0.5]), ()), "of which 2 are distinct"),
    (lambda: AdaptiveCodebook(3).bind(jnp.asarray([1.0, 2.0, 1.0]), ()), "of which 2 are distinct"),
    (lambda: fixed_point(0, 1), "bits: 0"),
    (lambda: powers_of_two(-3, 0), "smallest, largest"),
    (lambda: bind(LowRank(7)), r"rank: 7 of a \(6, 18\) matrix"),
    (lambda: LowRank(1).bind(weights().reshape(-1), (LAYER,)), "low rank needs one matrix"),
    (lambda: LowRank(1, value_bits=8), "value_bits: 8"),
    (lambda: LowRank(1, "columns"), "scheme: 'columns'"),
    (lambda: LowRank(1, "spatial").compress(weights(), MU), r"window: \(\)"),
    (lambda: PenaltyNuclear(1.0, "auto"), "scheme: 'auto'"),
    (lambda: Tucker2((2, 0)), r"ranks: \(2, 0\)"),
    (lambda: bind(Tucker2((7, 2))), r"ranks: \(7, 2\) of a \(6, 6, 3\) tensor; give at most"),
    (lambda: Tucker2((2, 2)).bind(weights(), (MatrixShape((), 18, 6),)), "one place; use LowRank"),
    (lambda: Cp(2).bind(weights().reshape(-1), (LAYER, LAYER)), "cp needs one convolution"),
    (lambda: Cp(0), "rank: 0"),
    (lambda: Cp(2, sweeps=0), "sweeps, restarts: 0, 2"),
    (lambda: Cp(2, window=(2, 4)).compress(weights(), MU), r"window: \(2, 4\) does not fit 18 columns"),
    (lambda: RankSelection(-1.0), "alpha: -1"),
    (lambda: RankSelection(1.0, (1.0, -2.0)), "cost: -2"),
    (lambda: Additive((PruneL0(1),)), "parts: 1"),
    (lambda: Additive((PruneL0(1), PruneL0(2)), 0), "rounds: 0"),
    (lambda: bind(Additive((PruneL0(1), PruneL0(109)))), "kappa: 109"),
    (lambda: OneOf((PruneL0(1),)), "parts: 1"),
    (lambda: Each(()), "parts: empty"),
    (lambda: Each((PruneL0(1), PruneL0(2))).bind(weights().reshape(-1), (LAYER,)), "parts: 2 for 1 layers"),
    (lambda: Each((PruneL0(1),)).compress(weights(), MU), "use it within a joint task"),
    (lambda: from_spec({"kind": "Path"}), "kind: 'Path' is no compression"),
    (lambda: from_spec({"kind": "PruneL0", "many": 3}), "kind: 'PruneL0' cannot be made"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


WRONG_TYPES = {
    "PruneNofM(2.0, 4)": "n: 2.0; give a whole number",
    "PruneNofM(2, nan)": "m: nan",
    "Tucker2((2.0, 2))": "ranks: (2.0, 2); give whole",
    "Tucker2((2, nan))": "ranks: (2, nan)",
    "Tucker2((2, 2), sweeps=0.5)": "sweeps: 0.5",
    "Additive((PruneL0(1), PruneL0(2)), 1.5)": "rounds: 1.5",
    "Additive((PruneL0(1), PruneL0(2)), nan)": "rounds: nan",
    "FixedCodebook((0.0, 'a'))": "values: 'a' is no finite number",
    "fixed_point(4.0, 1)": "bits: 4.0",
    "fixed_point(4, 0.5)": "fraction: 0.5",
    "powers_of_two(0, -0.5)": "smallest: -0.5",
    "powers_of_two(nan, 0)": "largest: nan",
    "RankSelection(1.0, (1.0, 2.0, 3.0))": "cost: (1.0, 2.0, 3.0) are 3 numbers; give one, or two",
}


def test_bad_types():
    """In a process of its own: within the tests types are checked before the code that has to speak is reached."""
    program = f"""
from math import nan
from solvers.compressions import *
for text in {list(WRONG_TYPES)}:
    try:
        print("made", eval(text))
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(WRONG_TYPES)
    for line, message in zip(lines, WRONG_TYPES.values(), strict=True):
        assert message in line


def test_separable_cp_needs_height_and_width():
    with pytest.raises(ValueError, match="separable: the window"):
        Cp(2, separable=True).bind(jnp.ones((4, 6)), (MatrixShape((3,), 2, 4),))
