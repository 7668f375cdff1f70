"""Every rule on every form; planted ranks, brute force over all ranks, and what must be said in words."""

from dataclasses import replace
from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest

from solvers.factor_sizes import FACTORED, cost, factor_sizes, full_ranks
from solvers.gram import GramStatistics, linear_error
from solvers.rank_rules import Cheapest, Energy, Evbmf, MaxDrop, RankChoice, RankProblem, Rate, Vbmf, settle
from solvers.terms import MatrixShape

SHAPE = MatrixShape((3, 3), 10, 14)
N, S, C, P = 14, 9, 10, 90
RULES = {
    "evbmf": Evbmf(),
    "vbmf": Vbmf(prior=0.3),
    "params": Rate(params=2.5),
    "macs": Rate(macs=2.5),
    "energy": Energy(kept=0.7),
    "cheapest": Cheapest(alpha=4e-4),
    "trial": MaxDrop(points=20.0),
    "predicted": MaxDrop(points=20.0, by="error"),
}
SILENT = [(rule, form) for rule, form in product(RULES, FACTORED) if not (rule == "cheapest" and form.startswith("cp"))]


def planted(ranks=(4, 3), noise=0.05, seed=0):
    """A kernel of these Tucker-2 ranks in noise."""
    rng = np.random.default_rng(seed)
    core = rng.normal(size=(ranks[0], S, ranks[1])) / np.sqrt(ranks[0] * ranks[1])
    tensor = np.einsum("asb,oa,cb->osc", core, rng.normal(size=(N, ranks[0])), rng.normal(size=(C, ranks[1])))
    return tensor.reshape(N, P) + noise * rng.normal(size=(N, P))


def statistics(w, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * P, P)) @ (np.eye(P) + 0.3 * rng.normal(size=(P, P)))
    gram = x.T @ x / len(x)
    arrays = {"gram": gram, "cross": w @ gram, "x_mean": np.zeros(P), "target_mean": np.zeros(N)}
    energy = jnp.asarray(np.sum((w @ gram) * w))
    return GramStatistics(**{k: jnp.asarray(v) for k, v in arrays.items()}, target_energy=energy)


def problem(form="low_rank", w=None, **more):
    w = planted() if w is None else w
    positions = tuple([64.0] * (len(factor_sizes(form, SHAPE, (1, 1))) - 2) + [16.0] * 2)
    stats = statistics(w)
    trial = lambda m, bias: 100 * float(linear_error(stats, jnp.asarray(m, stats.gram.dtype)))  # noqa: E731
    given = {"weights": w, "positions": positions, "statistics": stats, "trial": trial, **more}
    return RankProblem(form=form, shape=SHAPE, **given)


def all_ranks(form):
    return product(*(range(1, most + 1) for most in full_ranks(form, SHAPE)))


@pytest.mark.parametrize(("rule", "form"), SILENT)
def test_every_rule_gives_ranks_of_a_smaller_layer_or_a_reason(rule, form):
    given = problem(form)
    choice = settle(RULES[rule].choose(given), given)
    assert RULES[rule].needs in ("nothing", "response", "accuracy")
    if choice.ranks is None:
        assert choice.note
        return
    assert len(choice.ranks) == len(given.largest)
    assert all(1 <= r <= most for r, most in zip(choice.ranks, given.largest, strict=True))
    assert given.cost(choice.ranks, "params") < given.dense_cost("params")


@pytest.mark.parametrize("rule", [Evbmf(weakening=1.0, least=1), Evbmf(weakening=1.0, least=1, noise=0.0025)])
def test_evbmf_finds_planted_ranks(rule):
    for seed in range(3):
        w = planted((5, 3), seed=seed)
        assert rule.choose(problem("tucker2", w)).ranks == (5, 3)
        assert rule.choose(problem("cp3", w)).ranks == (5,)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(N, 4)) @ rng.normal(size=(4, P)) + 0.05 * rng.normal(size=(N, P))
    assert rule.choose(problem("low_rank", w)).ranks == (4,)
    pair = np.einsum("ois,sq->oiq", rng.normal(size=(N, 3, 4)), rng.normal(size=(4, 30))).reshape(N, P)
    assert rule.choose(problem("spatial", pair + 0.05 * rng.normal(size=(N, P)))).ranks == (4,)


def test_weakening_and_the_least_rank():
    w = planted((5, 3))
    assert Evbmf(weakening=0.5, least=2).choose(problem("tucker2", w)).ranks == (int(14 - 0.5 * 9), int(10 - 0.5 * 7))
    assert Evbmf(weakening=1.0, least=7).choose(problem("tucker2", w)).ranks == (7, 7)
    assert Evbmf(weakening=1.0, least=12).choose(problem("tucker2", w)).ranks == (12, 10)


def test_a_mode_without_signal_keeps_its_rank_and_small_layers_their_size():
    rng = np.random.default_rng(1)
    tensor = rng.normal(size=(N, S, C)) + 0.5 * rng.normal(size=(N, 1, 1)) * rng.normal(size=(1, S, C))
    choice = Evbmf(weakening=1.0, least=1).choose(problem("tucker2", tensor.reshape(N, P)))
    assert choice.ranks == (1, 10)
    assert "finds ranks (1, 0)" in choice.note
    w = planted((5, 3))
    assert Evbmf(weakening=1.0).choose(problem("tucker2", w)).ranks == (8, 8)
    assert Evbmf(weakening=1.0).choose(problem("cp3", w)).ranks == (5,)


def test_a_wider_prior_keeps_more():
    ranks = [Vbmf(prior=prior, weakening=1.0, least=1).choose(problem()).ranks for prior in (0.01, 0.1, 10.0)]
    found = [0 if r is None else r[0] for r in ranks]
    assert found == sorted(found)
    assert found[0] < found[-1]


@pytest.mark.parametrize("rule", [Vbmf(weakening=1.0, least=1), Evbmf(weakening=1.0, least=1)])
def test_the_scale_of_the_weights_does_not_matter(rule):
    choices = [rule.choose(problem(w=scale * planted(noise=0.3))) for scale in (1.0, 0.1, 0.001)]
    assert choices[0].ranks is not None
    assert choices[0].ranks[0] < N
    assert choices == 3 * choices[:1]


def test_rank_0_and_full_rank_are_said():
    """musco-pytorch takes rank 0 for full rank, and then builds a larger layer."""
    noise = np.random.default_rng(3).normal(size=(N, P))
    for form in FACTORED:
        choice = Evbmf().choose(problem(form, noise))
        assert choice.ranks is None
        assert "noise" in choice.note
    given = problem("low_rank", planted((14, 10)))
    choice = settle(Evbmf(weakening=1.0, noise=1e-9).choose(given), given)
    assert choice.ranks is None
    assert choice.note == "Evbmf finds full rank; full rank: nothing to leave out"


def test_a_layer_that_would_grow_stays():
    for form in FACTORED:
        given = problem(form)
        larger = [r for r in all_ranks(form) if given.cost(r, "params") >= given.dense_cost("params")]
        for ranks in larger[:-1]:
            choice = settle(RankChoice(ranks), given)
            assert choice.ranks is None
            assert choice.note
    assert "would store" in settle(RankChoice((13,)), problem("low_rank")).note
    assert settle(RankChoice((7,)), problem("low_rank"), round_to=4).ranks == (4,)
    assert settle(RankChoice((3,)), problem("low_rank"), round_to=4).ranks == (3,)
    assert settle(RankChoice(None, "why"), problem()) == RankChoice(None, "why")


@pytest.mark.parametrize("form", ["tucker2", "cp3", "cp4"])
def test_a_layer_with_strides_does_not_grow_in_multiply_adds(form):
    given, refused = problem(form), 0
    for ranks in all_ranks(form):
        choice = settle(RankChoice(ranks), given)
        grows = given.cost(ranks, "macs") > given.dense_cost("macs")
        if grows and given.cost(ranks, "params") < given.dense_cost("params") and ranks != given.largest:
            refused += 1
            assert "multiply-adds in place of 20,160" in choice.note
        assert choice.ranks is None or not grows
    assert refused


@pytest.mark.parametrize("form", FACTORED)
@pytest.mark.parametrize("what", ["params", "macs"])
def test_rates_are_kept_and_used_up(form, what):
    """Off the square too, where musco-pytorch pairs the outputs' rank with the inputs' channels."""
    given = problem(form)
    choice = Rate(**{what: 2.5}).choose(given)
    assert choice.ranks is not None
    limit = given.dense_cost(what) / 2.5
    assert given.cost(choice.ranks, what) <= limit
    for i in range(len(choice.ranks)):
        more = tuple(r + (i == j) for j, r in enumerate(choice.ranks))
        assert given.cost(more, what) > limit


def test_a_second_stage_starts_from_the_layer_as_it_is():
    w = planted((6, 5), noise=0.0) + 0.0
    given = problem("tucker2", w, previous=(6, 5))
    assert [core.shape for core in given.cores] == [(6, S * 5), (5, S * 6)]
    assert given.current_cost("params") == cost("tucker2", SHAPE, (6, 5))
    choice = Rate(params=1.5).choose(given)
    assert choice.ranks is not None
    assert given.cost(choice.ranks, "params") <= given.current_cost("params") / 1.5
    assert settle(RankChoice((6, 5)), given).note == "the ranks have settled"
    assert settle(RankChoice((6, 4)), given).ranks == (6, 4)
    # The core holds all of the energy, and its noise is that of the core, not the zeros around it.
    np.testing.assert_allclose(np.linalg.norm(given.cores[0]), np.linalg.norm(w))
    noisy = planted((3, 2), noise=0.0) + 0.0
    u, s, v = np.linalg.svd(noisy + 0.05 * np.random.default_rng(5).normal(size=(N, P)), full_matrices=False)
    cut = (u[:, :9] * s[:9]) @ v[:9]
    assert [c.shape for c in problem("low_rank", cut, previous=(9,)).cores] == [(N, 9)]
    found = Evbmf(weakening=1.0, least=1).choose(problem("low_rank", cut, previous=(9,))).ranks
    assert found is not None
    assert found[0] < 9


@pytest.mark.parametrize("form", FACTORED)
def test_energy_of_the_response_is_kept(form):
    given = problem(form)
    choice = Energy(kept=0.8).choose(given)
    assert choice.ranks is not None
    assert given.error(choice.ranks) <= 0.2 * 1.05  # spatial: by the Kronecker approximation of the Gram matrix
    if form in ("low_rank", "cp3"):
        assert given.error((choice.ranks[0] - 1,)) > 0.2


def test_energy_of_the_weights_against_numpy():
    w = planted(noise=0.4)
    s = np.linalg.svd(w, compute_uv=False) ** 2
    expected = int(np.argmax(np.cumsum(s) >= 0.85 * s.sum())) + 1
    given = replace(problem(w=w), statistics=None)
    assert Energy(kept=0.85, of="weights").choose(given).ranks == (expected,)
    with pytest.raises(ValueError, match="does not bound cp3"):
        Energy(of="weights").choose(replace(problem("cp3"), statistics=None))
    with pytest.raises(ValueError, match="statistics: None"):
        given.error((2,))


@pytest.mark.parametrize("alpha", [0.0, 1e-5, 3e-4, 2e-3, 1.0])
def test_the_cheapest_rank_against_all_ranks(alpha):
    w = planted(noise=0.2)
    given, total = problem(w=w), np.sum(w**2)
    s = np.linalg.svd(w, compute_uv=False) ** 2
    every = {r: alpha * r * (N + P) + 0.5 * s[r:].sum() / total for r in range(N + 1)}
    every[N] = alpha * N * P  # dense
    best = min(every, key=lambda r: every[r])
    assert Cheapest(alpha=alpha).choose(given).ranks == ((best,) if 0 < best < N else None)
    assert bool(Cheapest(alpha=alpha).choose(given).note) == (best in (0, N))
    tensor = w.reshape(N, S, C)
    modes = [np.linalg.svd(m, compute_uv=False) ** 2 for m in (w, tensor.transpose(2, 0, 1).reshape(C, -1))]
    values = {(0, 0): 0.5} | {
        r: alpha * cost("tucker2", SHAPE, r) + 0.5 * (modes[0][r[0] :].sum() + modes[1][r[1] :].sum()) / total
        for r in all_ranks("tucker2")
    }
    found = Cheapest(alpha=alpha).choose(problem("tucker2", w)).ranks or (0, 0)
    assert values[found] == pytest.approx(min(values.values()))


def test_the_largest_loss_of_accuracy_by_trial():
    """The points lost are 100 times the error here: the smallest rank within 10 points, in a few trials."""
    calls = []
    given = problem(w=planted(noise=0.4))
    trial = given.trial

    def counted(matrix, bias):
        calls.append(int(np.linalg.matrix_rank(np.asarray(matrix), tol=1e-3)))
        return trial(matrix, bias)

    choice = MaxDrop(points=10.0).choose(replace(given, trial=counted))
    assert choice.ranks is not None
    assert given.drop(choice.ranks) <= 10 < given.drop((choice.ranks[0] - 1,))
    assert len(calls) == len(set(calls)) <= 4
    assert MaxDrop(points=100.0).choose(problem("tucker2")).ranks == (1, 1)
    with pytest.raises(ValueError, match="trial: None"):
        MaxDrop().choose(replace(given, trial=None))


@pytest.mark.parametrize("form", ["low_rank", "tucker2"])
def test_the_largest_loss_of_accuracy_predicted_from_the_error(form):
    given = problem(form, planted(noise=0.4))
    choice = MaxDrop(points=10.0, by="error").choose(given)
    assert choice.ranks is not None
    assert 0.03 < given.error(choice.ranks) <= 0.1 * 1.001
    harmless = MaxDrop(points=1.0, by="error").choose(replace(given, trial=lambda m, bias: 0.0))
    assert harmless.ranks is not None
    assert all(r <= most for r, most in zip(harmless.ranks, choice.ranks, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Evbmf(weakening=0.0), "weakening: 0.0"),
        (lambda: Evbmf(least=0), "least: 0"),
        (lambda: Vbmf(prior=-1.0), "prior: -1.0"),
        (lambda: Rate(), "give the rate of one of them"),
        (lambda: Rate(params=2.0, macs=2.0), "give the rate of one of them"),
        (lambda: Rate(params=0.5), "params: 0.5 is not a rate above 1"),
        (lambda: Energy(kept=1.0), "kept: 1.0"),
        (lambda: Energy(of="noise"), "of: 'noise'"),
        (lambda: Cheapest(alpha=-1.0), "alpha: -1.0"),
        (lambda: Cheapest(alpha=1.0, what="bytes"), "what: 'bytes'"),
        (lambda: Cheapest(alpha=1.0).choose(problem("cp4")), "no formula for cp4"),
        (lambda: MaxDrop(points=-1.0), "points: -1.0"),
        (lambda: MaxDrop(by="luck"), "by: 'luck'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
