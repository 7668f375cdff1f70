from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from solvers import admm
from solvers.activation import IDENTITY, NAMED, RELU, Activation
from solvers.admm_state import AdmmOptions, AdmmSolution, Status, message, require_converged
from solvers.m_step import ExactLinear, MajorizeMinimize
from solvers.penalties import Constrained, Penalized, lambda_max, penalized_fractions, split_band
from solvers.penalty_parameter import Constant, Progress, ResidualBalancing, SupportGrowth, mean_curvature
from solvers.prox import COLUMNS, ENTRIES, ROWS, channels
from solvers.reconstruction import LayerProblem, loss, scale_features
from solvers.sgd import Sgd

D, P, N = 40, 8, 6
SHARP = AdmmOptions(rtol=1e-6, max_steps=1000)


def layer(activation: Activation, seed: int = 0, d: int = D, p: int = P, n: int = N) -> LayerProblem:
    """Rank one plus two columns plus a little noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(d, p)) @ (np.eye(p) + 0.3 * rng.normal(size=(p, p)))
    w = rng.normal(size=(n, 1)) @ rng.normal(size=(1, p)) + 0.05 * rng.normal(size=(n, p))
    w[:, :2] += 2 * rng.normal(size=(n, 2))
    bias = 0.3 * rng.normal(size=n)
    z = x @ w.T + bias
    return LayerProblem(
        x=jnp.asarray(x),
        y=activation(jnp.asarray(z)),
        bias=jnp.asarray(bias),
        response=jnp.asarray(z),
        activation=activation,
    )


def fractions(problem, sparse=0.1, rank=0.1, **kwargs):
    return penalized_fractions(problem, jnp.asarray(sparse), jnp.asarray(rank), **kwargs)


def stack(items):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *items)


def shapes(tree):
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def optimum(problem, penalty):
    cp = pytest.importorskip("cvxpy")
    x, y, bias = (np.asarray(v) for v in (problem.x, problem.y, problem.bias))
    a, b = cp.Variable((bias.size, x.shape[1])), cp.Variable((bias.size, x.shape[1]))
    fit = cp.sum_squares(y - bias - x @ (a + b).T) / (2 * np.sum(y**2))
    terms = float(penalty.lambda_sparse) * cp.sum(cp.norm(a, 2, axis=0)) + float(penalty.lambda_rank) * cp.normNuc(b)
    program = cp.Problem(cp.Minimize(fit + terms))
    program.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return program.value


def kkt_violation(problem, penalty, solution):
    """How far each stationarity condition is from holding at the solution, relative to its multiplier."""
    a, b = solution.sparse, solution.low_rank
    gradient = jax.grad(loss, argnums=1)(problem, a + b)
    l1, l2 = penalty.lambda_sparse, penalty.lambda_rank
    inner_a, inner_b = -jnp.sum(gradient * a), -jnp.sum(gradient * b)
    nuclear = jnp.sum(jnp.linalg.svd(b, compute_uv=False))
    return {
        "dual norm of a": jnp.max(penalty.grouping.norms(gradient)) / l1 - 1,
        "dual norm of b": jnp.linalg.norm(gradient, 2) / l2 - 1,
        "alignment of a": jnp.abs(inner_a / (l1 * jnp.sum(penalty.grouping.norms(a))) - 1),
        "alignment of b": jnp.abs(inner_b / (l2 * nuclear) - 1),
    }


@pytest.mark.parametrize("splitting", ["three_block", "two_block"])
def test_convex_optimum_from_every_t(splitting):
    options = replace(SHARP, rtol=1e-5, splitting=splitting, max_steps=2000)
    for seed in range(3 if splitting == "two_block" else 6):
        problem = layer(IDENTITY, seed)
        penalty = fractions(problem, 0.05 + 0.03 * seed, 0.15 - 0.02 * seed)
        best = optimum(problem, penalty)
        for tau in (0.01, 0.1, 1.0, 10.0, 100.0):
            solution = require_converged(admm.solve(problem, penalty, options=options, t=tau * mean_curvature(problem)))
            assert abs(float(solution.objective) / best - 1) < 1e-4, (seed, tau)


@pytest.mark.parametrize("activation", [IDENTITY, RELU], ids=lambda a: a.name)
def test_solution_is_stationary(activation):
    problem = layer(activation)
    penalty = fractions(problem, 0.08, 0.05)
    solution = require_converged(admm.solve(problem, penalty, options=SHARP))
    violation = kkt_violation(problem, penalty, solution)
    assert 0 < jnp.sum(solution.kept) < P
    assert solution.rank > 0
    for condition, value in violation.items():
        assert value < 1e-3, condition


def test_solution_reports_what_it_is():
    problem = layer(RELU)
    penalty = fractions(problem, 0.08, 0.05)
    solution = admm.solve(problem, penalty, options=SHARP)
    value = loss(problem, solution.sparse + solution.low_rank)
    value += penalty.lambda_sparse * jnp.sum(jnp.linalg.norm(solution.sparse, axis=0))
    value += penalty.lambda_rank * jnp.sum(jnp.linalg.svd(solution.low_rank, compute_uv=False))
    np.testing.assert_allclose(solution.objective, value, rtol=1e-10)
    np.testing.assert_array_equal(solution.kept, jnp.any(solution.sparse != 0, axis=0))
    assert int(solution.rank) == np.linalg.matrix_rank(np.asarray(solution.low_rank), tol=1e-9)
    steps, history = int(solution.num_steps), solution.history
    assert np.all(np.isfinite(history.primal_residual[:steps]))
    assert np.all(np.isnan(history.primal_residual[steps:]))
    judged = np.flatnonzero(np.isfinite(history.objective)) + 1
    np.testing.assert_array_equal(judged, np.arange(SHARP.check_every, steps + 1, SHARP.check_every))
    np.testing.assert_allclose(np.nanmin(history.objective), solution.objective)
    assert float(history.primal_residual[steps - 1]) == float(solution.primal_residual) <= SHARP.rtol
    gap = jnp.linalg.norm(solution.sparse + solution.low_rank - solution.split)
    assert gap <= 1e-4 * jnp.linalg.norm(solution.split)


def test_relu_objective_is_within_one_per_cent_of_longer_searches():
    default = AdmmOptions()
    longer = replace(default, rtol=1e-6, max_steps=10 * default.max_steps)
    rivals = [replace(longer, m_step=MajorizeMinimize(momentum=0.0)), replace(longer, splitting="two_block")]
    for seed in range(5):
        problem = layer(RELU, seed)
        penalty = fractions(problem, 0.05, 0.05)
        found = float(admm.solve(problem, penalty, options=default).objective)
        best = min(float(admm.solve(problem, penalty, options=o).objective) for o in rivals)
        assert found <= 1.01 * best, seed


TRACES = []


@dataclass(frozen=True, kw_only=True)
class CountedMajorizeMinimize(MajorizeMinimize):
    def prepare(self, problem):
        TRACES.append(self)
        return super().prepare(problem)


def test_a_sweep_compiles_once_and_vmap_is_a_loop():
    problem = layer(RELU)
    options = AdmmOptions(m_step=CountedMajorizeMinimize(), max_steps=100)
    TRACES.clear()
    sweep = [fractions(problem, f, f) for f in np.geomspace(0.5, 0.01, 20)]
    looped = [admm.solve(problem, penalty, options=options) for penalty in sweep]
    assert len(TRACES) == 1
    kept = [int(jnp.sum(s.kept)) for s in looped]
    assert kept[0] < kept[-1]
    batched = jax.vmap(lambda g: admm.solve(problem, g, options=options))(stack(sweep[::7]))
    for i, solution in enumerate(looped[::7]):
        np.testing.assert_allclose(batched.objective[i], solution.objective, rtol=1e-8)
        np.testing.assert_allclose(batched.sparse[i], solution.sparse, atol=1e-7)
        assert batched.num_steps[i] == solution.num_steps
        assert batched.status[i] == solution.status
    assert len(TRACES) == 1  # batching reuses the traced program


def test_path_is_the_warm_started_sequence():
    problem = layer(IDENTITY)
    levels = jnp.geomspace(1.01, 0.02, 6)
    penalties = penalized_fractions(problem, levels, levels)
    found = admm.path(problem, penalties, options=SHARP)
    assert found.sparse.shape == (6, N, P)
    assert not jnp.any(found.kept[0])
    start, steps = None, []
    for i in range(6):
        start = admm.solve(problem, jax.tree.map(lambda v, i=i: v[i], penalties), options=SHARP, start=start)
        steps.append(int(start.num_steps))
        np.testing.assert_allclose(found.objective[i], start.objective, rtol=1e-9)
    np.testing.assert_array_equal(found.num_steps, steps)
    assert jnp.all(jnp.diff(found.objective) <= 1e-12)
    assert found.objective[-1] < 0.1 * found.objective[0]
    with pytest.raises(ValueError, match="leading axes"):
        admm.path(problem, fractions(problem))


def test_driving_by_hand_is_solve():
    problem = layer(RELU)
    penalty = fractions(problem)
    prepared = admm.prepare(problem, SHARP)
    state = admm.init(problem, penalty, prepared, SHARP)
    advance = jax.jit(lambda s: admm.step(problem, penalty, prepared, SHARP, s))
    structure = shapes(state)
    while int(state.status) == Status.RUNNING:
        state = advance(state)
        assert int(admm.terminate(state, SHARP)) == int(state.status)
    assert shapes(state) == structure
    whole = admm.solve(problem, penalty, options=SHARP)
    assert int(state.num_steps) == int(whole.num_steps)
    np.testing.assert_allclose(admm.to_solution(state).sparse, whole.sparse, atol=1e-9)


def test_warm_start_and_over_relaxation_reach_the_same_optimum():
    problem = layer(IDENTITY)
    penalty = fractions(problem)
    cold = admm.solve(problem, penalty, options=SHARP)
    warm = admm.solve(problem, penalty, options=SHARP, start=cold)
    assert int(warm.num_steps) == SHARP.check_every
    from_matrix = admm.solve(problem, penalty, options=SHARP, start=cold.split)
    for options in (
        replace(SHARP, splitting="two_block", over_relaxation=1.6),
        replace(SHARP, m_step=ExactLinear(), rule=Constant(), tau=0.3),
    ):
        other = require_converged(admm.solve(problem, penalty, options=options))
        np.testing.assert_allclose(other.objective, cold.objective, rtol=1e-7)
    np.testing.assert_allclose([warm.objective, from_matrix.objective], cold.objective, rtol=1e-7)


def test_lambda_max_is_where_the_solution_leaves_zero():
    problem = layer(IDENTITY)
    max_sparse, max_rank = lambda_max(problem)
    above = require_converged(admm.solve(problem, Penalized(1.001 * max_sparse, 1.001 * max_rank), options=SHARP))
    assert not jnp.any(above.sparse)
    assert not jnp.any(above.low_rank)
    for sparse, rank, group, nuclear in ((0.97, 1.001, True, False), (1.001, 0.97, False, True)):
        below = admm.solve(problem, Penalized(sparse * max_sparse, rank * max_rank), options=SHARP)
        assert (bool(jnp.any(below.sparse)), bool(jnp.any(below.low_rank))) == (group, nuclear)


def test_one_part_is_zero_outside_the_band():
    problem = layer(IDENTITY)
    low, high = split_band((N, P))
    assert (low, high) == (1.0, np.sqrt(P))
    assert split_band((N, P), channels(2)) == (0.5, np.sqrt(2))
    max_sparse, max_rank = lambda_max(problem)
    assert low <= max_rank / max_sparse <= high
    weight = 0.05 * max_sparse
    below = admm.solve(problem, Penalized(weight, 0.98 * low * weight), options=SHARP)
    inside = admm.solve(problem, Penalized(weight, 1.3 * weight), options=SHARP)
    above = admm.solve(problem, Penalized(weight, 1.02 * high * weight), options=SHARP)
    parts = [(bool(jnp.any(s.sparse)), bool(jnp.any(s.low_rank))) for s in (below, inside, above)]
    assert parts == [(False, True), (True, True), (True, False)]


@pytest.mark.parametrize(("grouping", "num_kept"), [(COLUMNS, 2), (ENTRIES, 12)], ids=lambda v: str(v))
def test_constraints_hold_and_the_planted_layer_is_found(grouping, num_kept):
    rng = np.random.default_rng(3)
    x, rank_one = rng.normal(size=(80, P)), rng.normal(size=(N, 1)) @ rng.normal(size=(1, P))
    w = rank_one.copy()
    w[:, 3:5] += 2 * rng.normal(size=(N, 2))
    problem = LayerProblem(x=jnp.asarray(x), y=jnp.maximum(jnp.asarray(x @ w.T), 0), bias=jnp.zeros(N), activation=RELU)
    options = AdmmOptions(max_steps=800, check_every=20)
    solution = admm.solve(problem, Constrained(num_kept, 1, grouping), options=options)
    assert jnp.sum(grouping.norms(solution.sparse) > 0) <= num_kept
    assert np.linalg.matrix_rank(np.asarray(solution.low_rank), tol=1e-8) <= 1
    assert solution.objective < 1e-3
    if grouping == COLUMNS:
        np.testing.assert_array_equal(np.flatnonzero(solution.kept), [3, 4])
        smaller = admm.solve(problem, Constrained(0, 1, grouping), options=options)  # traced: no new compilation
        assert not jnp.any(smaller.sparse)
        assert smaller.objective > 10 * solution.objective


@pytest.mark.parametrize("grouping", [ROWS, channels(4)], ids=lambda g: g.name)
def test_other_groups_are_kept_or_dropped_whole(grouping):
    problem = layer(RELU)
    penalty = fractions(problem, 0.2, 0.2, grouping=grouping)
    solution = admm.solve(problem, penalty, options=AdmmOptions())
    assert 0 < jnp.sum(solution.kept) < grouping.count((N, P))
    whole = grouping.expand(solution.kept, (N, P))
    np.testing.assert_array_equal(solution.sparse != 0, whole)


def test_scaled_columns_are_the_problem_in_scaled_features():
    problem = layer(IDENTITY)
    problem = replace(problem, x=problem.x * jnp.geomspace(0.1, 10, P)[None, :])
    penalty = fractions(problem, 0.1, 0.1, scale_columns=True)
    solution = admm.solve(problem, penalty, options=replace(SHARP, scale_columns=True))
    scaled, scale = scale_features(problem)
    direct = admm.solve(scaled, penalty, options=SHARP)
    np.testing.assert_allclose(solution.sparse * scale[None, :], direct.sparse, atol=1e-9)
    np.testing.assert_allclose(solution.dual / scale[None, :], direct.dual, atol=1e-9)
    along = admm.path(problem, stack([penalty]), options=replace(SHARP, scale_columns=True), start=solution)
    assert int(along.num_steps[0]) == SHARP.check_every
    np.testing.assert_allclose(along.objective[0], solution.objective, rtol=1e-8)


def test_sgd_solves_any_activation_and_repeats_itself():
    problem = layer(NAMED["tanh"])
    penalty = fractions(problem, 0.02, 0.02)
    start = jnp.linalg.lstsq(problem.x, problem.response - problem.bias[None, :])[0].T
    options = AdmmOptions(m_step=Sgd(batch_size=16, steps=20, learning_rate=0.1), max_steps=60)
    key = jax.random.key(1)
    first, second = (admm.solve(problem, penalty, options=options, start=start, key=key) for _ in range(2))
    np.testing.assert_array_equal(first.sparse, second.sparse)
    other = admm.solve(problem, penalty, options=options, start=start, key=jax.random.key(2))
    assert jnp.any(other.sparse != first.sparse)
    assert first.objective < 0.5 * loss(problem, jnp.zeros((N, P)))


@pytest.mark.parametrize(("d", "p", "n"), [(1, 5, 3), (4, 9, 3), (30, 3, 7)], ids=["one row", "d < p", "n > p"])
def test_degenerate_shapes(d, p, n):
    problem = layer(RELU, d=d, p=p, n=n)
    problem = replace(problem, y=problem.y.at[0, 0].set(1.0))
    solution = admm.solve(problem, fractions(problem, 0.01, 0.01))
    assert solution.status in (Status.CONVERGED, Status.MAX_STEPS)
    assert jnp.isfinite(solution.objective)
    assert solution.objective < loss(problem, jnp.zeros((n, p)))


def test_a_zero_target_gives_zero():
    problem = replace(layer(RELU), y=jnp.zeros((D, N)), bias=jnp.zeros(N))
    assert lambda_max(problem) == (0, 0)
    solution = require_converged(admm.solve(problem, Penalized(0.1, 0.1), options=SHARP))
    assert not jnp.any(solution.sparse + solution.low_rank)
    assert solution.objective == 0


def test_nan_is_refused_on_the_host_and_a_status_under_tracing():
    problem = layer(RELU)
    bad = replace(problem, y=problem.y.at[3, 1].set(jnp.nan))
    with pytest.raises(ValueError, match="y holds NaN or Inf"):
        admm.solve(bad, fractions(problem))
    penalty = fractions(problem)
    both = jax.vmap(lambda q: admm.solve(q, penalty))(stack([problem, bad]))
    assert both.status[1] == Status.DIVERGED
    alone = admm.solve(problem, penalty)
    np.testing.assert_allclose(both.sparse[0], alone.sparse, atol=1e-8)
    assert both.status[0] == alone.status == Status.CONVERGED
    assert int(both.num_steps[1]) <= AdmmOptions().check_every
    with pytest.raises(RuntimeError, match="DIVERGED.*non-finite"):
        require_converged(both)


def test_status_of_an_unfinished_solve():
    problem = layer(RELU)
    calls = []
    options = AdmmOptions(max_steps=3, check_every=2, on_step=calls.append)
    solution = admm.solve(problem, fractions(problem), options=options)
    jax.effects_barrier()
    assert solution.status == Status.MAX_STEPS
    assert "max_steps" in message(solution.status)
    assert sorted(int(c.num_steps) for c in calls) == [1, 2, 3]
    assert jnp.isfinite(solution.objective)
    np.testing.assert_array_equal(np.isfinite(solution.history.objective), [False, True, True])
    with pytest.raises(RuntimeError, match="MAX_STEPS"):
        require_converged(solution)


def test_float32():
    with jax.enable_x64(False):
        problem = jax.tree.map(lambda v: v.astype(jnp.float32), layer(RELU))
        penalty = penalized_fractions(problem, 0.08, 0.05)
        solution = require_converged(admm.solve(problem, penalty))
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(solution) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert dtypes == {jnp.dtype(jnp.float32)}
        objective = float(solution.objective)
    problem = layer(RELU)
    precise = admm.solve(problem, fractions(problem, 0.08, 0.05), options=SHARP)
    assert abs(objective / float(precise.objective) - 1) < 2e-3


def test_rules_move_t_within_their_limits():
    def look(primal, dual, changed=0.0, num_steps=20, stalled=False):
        return Progress(*map(jnp.asarray, (primal, dual, changed, num_steps, stalled)))

    balancing = ResidualBalancing()
    cases = [
        (look(1.0, 0.1), 2.0),
        (look(0.1, 1.0), 0.5),
        (look(1.0, 0.9), 1.0),
        (look(1.0, 0.1, num_steps=500), 1.0),
        (look(1.0, 0.9, num_steps=500, stalled=True), 2.0),
        (look(0.1, 1.0, num_steps=500, stalled=True), 1.0),
    ]
    assert [float(balancing.factor(progress)) for progress, _ in cases] == [factor for _, factor in cases]
    growth = [float(SupportGrowth().factor(look(1.0, 1.0, c))) for c in (0.0, 1e-3, 0.01, 0.5)]
    assert growth == [1.0, 1.02, 1.05, 1.1]
    problem = layer(RELU)
    eager = replace(AdmmOptions(), rule=ResidualBalancing(every=1, ratio=1.0, max_changes=2), max_steps=40)
    moved = float(admm.solve(problem, fractions(problem), options=eager).t / mean_curvature(problem))
    assert round(moved, 9) in (0.25, 1.0, 4.0)


@pytest.mark.parametrize(
    ("penalty", "text"),
    [
        (Penalized(-1.0, 0.1), "lambda_sparse=-1.0"),
        (Penalized(0.1, float("nan")), "lambda_rank=nan"),
        (Penalized(0.1, 0.1, channels(3)), "c_in=3"),
        (Constrained(P + 1, 1), "num_kept=9: pass an integer between 0 and 8"),
        (Constrained(1, N + 1), "rank=7: pass an integer between 0 and 6"),
    ],
)
def test_penalties_out_of_range_are_refused(penalty, text):
    with pytest.raises(ValueError, match=text):
        admm.solve(layer(RELU), penalty)


def test_other_arguments_out_of_range_are_refused():
    problem = layer(RELU)
    with pytest.raises(ValueError, match=r"start has shape \(6, 9\)"):
        admm.solve(problem, Penalized(0.1, 0.1), start=jnp.zeros((N, P + 1)))
    with pytest.raises(ValueError, match="t=-1"):
        admm.solve(problem, Penalized(0.1, 0.1), t=-1.0)
    with pytest.raises(ValueError, match="sparse=-0.5"):
        penalized_fractions(problem, -0.5, 0.5)
    with pytest.raises(ValueError, match="Sgd"):
        admm.solve(layer(NAMED["gelu"]), Penalized(0.1, 0.1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("over_relaxation", 2.0), ("tau", 0.0), ("rtol", -1.0), ("max_steps", 0), ("check_every", 0)],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        AdmmOptions(**{name: value})


def test_solution_is_a_pytree_with_named_fields():
    problem = layer(RELU)
    solution = admm.solve(problem, fractions(problem), options=SHARP)
    doubled = jax.tree.map(lambda v: v, solution)
    assert isinstance(doubled, AdmmSolution)
    np.testing.assert_array_equal(doubled.kept, solution.kept)


def more_columns_than(limit, solution):
    return jnp.sum(solution.kept) > limit


def test_a_path_stops_where_it_is_told_to():
    problem = layer(RELU)
    levels = jnp.geomspace(0.5, 0.02, 5)
    penalties = penalized_fractions(problem, levels, levels)
    full = admm.path(problem, penalties)
    limit = jnp.sum(full.kept[2])
    cut = admm.path(problem, penalties, until=Partial(more_columns_than, limit - 1))
    stop = int(jnp.argmax(jnp.sum(full.kept, axis=1) >= limit))
    np.testing.assert_array_equal(cut.kept[: stop + 1], full.kept[: stop + 1])
    for later in range(stop + 1, 5):
        np.testing.assert_array_equal(cut.split[later], cut.split[stop])
