"""The front door of one layer: budgets kept, the best form chosen, trouble reported."""

from dataclasses import replace
from math import inf

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import near_low_rank

from solvers.factor_sizes import cost
from solvers.layer import FORM_NAMES, LayerOptions, dense, minimum_budget, solve
from solvers.reconstruction import LayerProblem, relative_error
from solvers.terms import LowRank, MatrixShape

SHAPE = MatrixShape((3, 3), 4, 16)
BUDGET = 0.5 * SHAPE.n * SHAPE.p


@pytest.fixture(scope="module", autouse=True)
def strict_double_precision():
    """The front door chooses its precision itself: callers hand it float32."""
    with jax.enable_x64(False):
        yield


def make(d, seed=0):
    """Rows of correlated features, and the responses of a matrix that is near low rank."""
    x, w = near_low_rank(SHAPE, d, seed)
    n = SHAPE.n
    h = jnp.asarray(x @ w.T - 0.2)
    problem = LayerProblem(x=jnp.asarray(x), y=jnp.maximum(h, 0), response=h, bias=jnp.full(n, -0.2, jnp.float32))
    return problem, jnp.asarray(w)


@pytest.fixture(scope="module")
def solved():
    rows, held_out = make(4096)[0], make(1024, seed=1)[0]
    options = LayerOptions(form=FORM_NAMES, refine_within=inf)
    return rows, held_out, solve(rows, held_out, SHAPE, budget=BUDGET, options=options)


def test_every_form_is_within_the_budget_as_stored(solved):
    fit = solved[2]
    assert set(fit.forms) == set(FORM_NAMES)
    for result in fit.forms.values():
        assert 0.8 * BUDGET < result.params + result.index_bits / 32 <= BUDGET


def test_the_winner_is_the_best_on_held_out_rows_and_stored_as_measured(solved):
    rows, held_out, fit = solved
    assert fit.forms[fit.form].error == min(result.error for result in fit.forms.values())
    matrix, bias = jnp.asarray(fit.matrix(SHAPE)), jnp.asarray(fit.bias)
    for problem, error in zip((rows, held_out), fit.errors, strict=True):
        np.testing.assert_allclose(relative_error(problem, matrix, bias), error, rtol=1e-3)


def test_refinement_only_helps_and_two_levels_contain_columns(solved):
    forms = solved[2].forms
    assert all(result.refined <= result.selected for result in forms.values())
    assert forms["two_level"].linear <= forms["columns"].linear


def test_one_form_by_name(solved):
    rows, held_out, both = solved
    fit = solve(rows, held_out, SHAPE, budget=BUDGET, options=LayerOptions(form="columns", refine=None))
    assert set(fit.forms) == {"columns"}
    assert fit.forms["columns"].refined is None
    np.testing.assert_allclose(fit.forms["columns"].selected, both.forms["columns"].selected, rtol=1e-4)


def test_whole_channels(solved):
    rows, held_out, _ = solved
    options = LayerOptions(form="columns", group="channel", refine=None)
    kept = np.any(solve(rows, held_out, SHAPE, budget=BUDGET, options=options).matrix(SHAPE) != 0, axis=0)
    by_channel = kept.reshape(9, SHAPE.c_in)
    assert np.all(by_channel == by_channel[:1])
    assert 0 < kept.sum() < SHAPE.p


@pytest.mark.parametrize("form", FORM_NAMES)
def test_sizes_are_multiples(solved, form):
    rows, held_out, _ = solved
    for unit, budget in ((4, BUDGET), (3, 0.7 * BUDGET)):
        options = LayerOptions(form=form, refine=None, round_to=unit)
        fit = solve(rows, held_out, SHAPE, budget=budget, options=options)
        result = fit.forms[form]
        assert result.params + result.index_bits / 32 <= budget
        assert result.params > 0.5 * budget
        assert (result.kept_columns % unit, result.rank % unit) == (0, 0)
        for term in fit.terms:
            if isinstance(term, LowRank) and form == "two_level":
                assert len(term.indices) % unit == 0
        own_size = result.params + 3 * SHAPE.p / 32 + 2  # with room for what the form reserves for indices
        other = solve(rows, held_out, SHAPE, budget=own_size, options=replace(options, round_to=1))
        assert result.linear < 1.5 * other.forms[form].linear


@pytest.mark.parametrize("form", ["columns", "admm"])
def test_numbers_of_channels_are_multiples(solved, form):
    rows, held_out, _ = solved
    options = LayerOptions(form=form, group="channel", refine=None, round_to=2)
    fit = solve(rows, held_out, SHAPE, budget=0.85 * SHAPE.n * SHAPE.p, options=options)
    assert fit.forms[form].kept_columns == 18


@pytest.mark.parametrize("form", ["columns", "low_rank", "two_level", "spatial"])
def test_less_than_a_multiple_stays_as_it_is(solved, form):
    rows, held_out, free = solved
    options = LayerOptions(form=form, refine=None, round_to=1000)
    fit = solve(rows, held_out, SHAPE, budget=BUDGET, options=options)
    assert fit.status == "ok"
    if form in ("columns", "low_rank"):
        assert fit.forms[form].params == free.forms[form].params


def test_penalties_and_multiples(solved):
    rows, held_out, _ = solved
    fit = solve(rows, held_out, SHAPE, penalties=(0.02, 0.02), options=LayerOptions(round_to=5, refine=None))
    assert (fit.forms["admm"].kept_columns % 5, fit.forms["admm"].rank % 5) == (0, 0)


def test_larger_penalties_keep_less(solved):
    rows, held_out, _ = solved
    fits = [solve(rows, held_out, SHAPE, penalties=(f, f)) for f in (0.02, 0.2)]
    assert fits[0].forms["admm"].params > fits[1].forms["admm"].params
    assert fits[0].errors[1] < fits[1].errors[1]


@pytest.mark.parametrize(
    ("form", "ranks"), [("low_rank", (3,)), ("spatial", (4,)), ("tucker2", (5, 2)), ("cp3", (7,)), ("cp4", (6,))]
)
def test_ranks_in_place_of_a_budget(solved, form, ranks):
    rows, held_out, _ = solved
    options = LayerOptions(form=form, ranks=ranks, gauge=False, refine=None)
    (term,) = solve(rows, held_out, SHAPE, options=options).terms
    assert term.num_params == cost(form, SHAPE, ranks)
    assert getattr(term, "rank") == ranks[0]  # noqa: B009


def test_the_weights_alone(solved):
    """Without data the fit is the decomposition of the original matrix; with data it is better on the response."""
    rows, held_out, _ = solved
    w = make(8)[1]
    both = {}
    for aware in (True, False):
        options = LayerOptions(form="low_rank", ranks=(3,), gauge=False, data_aware=aware)
        both[aware] = solve(rows, held_out, SHAPE, original=w, options=options)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(both[False].matrix(SHAPE), (u[:, :3] * s[:3]) @ v[:3], atol=1e-5)
    np.testing.assert_array_equal(both[False].bias, rows.bias)
    assert both[False].forms["low_rank"].refined is None
    assert both[True].errors[1] < both[False].errors[1]
    with pytest.raises(ValueError, match="original: None"):
        solve(rows, held_out, SHAPE, budget=BUDGET, options=LayerOptions(form="columns", data_aware=False))


def test_output_weights_move_the_error_where_they_are_small():
    rows, held_out = make(4096)[0], make(1024, seed=1)[0]
    weights = jnp.where(jnp.arange(SHAPE.n) < 4, 25.0, 1.0)
    options = LayerOptions(form=("columns", "low_rank"), refine=None)

    def error_of_heavy_outputs(problem, other):
        fit = solve(problem, other, SHAPE, budget=0.3 * BUDGET, options=options)
        heavy = replace(held_out, weights=(weights > 1).astype(jnp.float32))
        return relative_error(heavy, jnp.asarray(fit.matrix(SHAPE)), jnp.asarray(fit.bias))

    weighted = error_of_heavy_outputs(replace(rows, weights=weights), replace(held_out, weights=weights))
    assert weighted < error_of_heavy_outputs(rows, held_out)


def test_dependent_features_get_the_ridge_they_need():
    """Copies of columns: float32 moments are then indefinite by more than the smallest ridge."""
    problem, w = make(4096)
    x = jnp.concatenate([problem.x, problem.x * 100, problem.x * (1 + 1e-4)], axis=1)
    rows = replace(problem, x=x)
    shape = MatrixShape((3, 3), 3 * SHAPE.c_in, SHAPE.n)
    options = LayerOptions(form=("columns", "low_rank"), refine=None, ridge=1e-12, float64_up_to=0)
    fit = solve(rows, rows, shape, budget=float(SHAPE.n * SHAPE.p), original=jnp.tile(w, (1, 3)), options=options)
    assert fit.status == "ok"
    assert fit.errors[1] < 0.05


def test_few_rows_stay_near_the_original():
    (rows, w), held_out = make(40), make(1024, seed=1)[0]
    options = LayerOptions(form="columns", refine=None)
    plain = solve(rows, held_out, SHAPE, budget=BUDGET, options=options)
    known = solve(rows, held_out, SHAPE, budget=BUDGET, original=w, options=options)
    assert known.errors[1] < plain.errors[1]
    assert any("40 rows for 36 features" in warning for warning in plain.warnings)


def test_a_response_without_numbers_is_a_status():
    rows, held_out = make(512)[0], make(128, seed=1)[0]
    broken = replace(rows, y=rows.y * jnp.nan, response=rows.response * jnp.nan)
    fit = solve(broken, held_out, SHAPE, budget=BUDGET, options=LayerOptions(form="columns"))
    assert (fit.status, fit.form, fit.terms) == ("diverged", "dense", ())


def test_dense_is_the_layer_itself():
    problem, w = make(64)
    fit = dense(problem, w, problem.bias)
    np.testing.assert_array_equal(fit.matrix(SHAPE), w)
    assert fit.form == "dense"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"budget": BUDGET, "penalties": (0.1, 0.1)}, "exactly one"),
        ({"budget": 3.0}, f"below the smallest reachable, {minimum_budget(SHAPE):g}"),
        ({"penalties": (-0.1, 0.1)}, r"penalties: \(-0.1, 0.1\)"),
        ({"penalties": (0.1, float("nan"))}, "fractions of the maxima"),
        ({"budget": BUDGET, "options": LayerOptions(form="cp3", ranks=(2,))}, "exactly one"),
        ({"options": LayerOptions(form="cp3", ranks=(0,))}, "at least 1 and at most"),
        ({"options": LayerOptions(form="tucker2", ranks=(2,))}, r"give \(outputs, inputs\)"),
    ],
)
def test_bad_arguments(arguments, message):
    rows = make(64)[0]
    with pytest.raises(ValueError, match=message):
        solve(rows, rows, SHAPE, **arguments)


def test_rows_of_another_layer():
    rows = make(64)[0]
    with pytest.raises(ValueError, match="36 features and 16 outputs"):
        solve(rows, rows, MatrixShape((3, 3), 5, 16), budget=BUDGET)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "wavelets"},
        {"form": ()},
        {"group": "row"},
        {"round_to": 0},
        {"admm_fractions": ()},
        {"admm_fractions": (0.1, 0.2)},
        {"admm_fractions": (0.1, 0.0)},
        {"ranks": (2,)},
        {"ranks": (2,), "form": "columns"},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LayerOptions(**options)
