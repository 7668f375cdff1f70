"""Refinement after the activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers.activation import IDENTITY, NAMED, RELU
from solvers.gram import best_bias, gram_statistics, with_ridge
from solvers.reconstruction import LayerProblem, relative_error
from solvers.refine import RefineOptions, blend_for, refine
from solvers.structure import column_structure, fit

N, P, D = 6, 12, 6000


def rows(d, seed, activation=RELU, offset=False):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(100).normal(size=(P, P))
    w = np.random.default_rng(101).normal(size=(N, P)) / np.sqrt(P)
    x = np.maximum(rng.normal(size=(d, P)) @ mix / np.sqrt(P), 0)
    s = 0.3 * rng.normal(size=(d, N)) if offset else None
    h = jnp.asarray(x @ w.T - 0.3 + (0 if s is None else s))
    return LayerProblem(
        x=jnp.asarray(x),
        y=activation(h),
        response=h,
        bias=jnp.zeros(N),
        offset=None if s is None else jnp.asarray(s),
        activation=activation,
    )


def start(problem, kept=6):
    stats = with_ridge(gram_statistics(problem), 1e-8)
    index = jnp.arange(P)
    structure = column_structure(stats.gram, index < kept, (index >= kept) & (index < kept + 3), 1)
    m = fit(structure, stats.cross)
    return stats, structure, m, best_bias(stats, m)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("name", ["relu", "relu6", "tanh", "gelu"])
def test_held_out_error_falls_and_the_structure_stays(name, offset):
    problem, held_out = rows(D, 0, NAMED[name], offset), rows(D, 1, NAMED[name], offset)
    stats, structure, m, bias = start(problem)
    done = refine(problem, held_out, stats, structure, m, bias, 1.0)
    np.testing.assert_allclose(done.held_out_errors[0], relative_error(held_out, m, bias), rtol=1e-9)
    best = relative_error(held_out, done.matrix, done.bias)
    np.testing.assert_allclose(best, jnp.min(done.held_out_errors), rtol=1e-9)
    assert jnp.min(done.held_out_errors) < (0.995 if name == "tanh" else 0.97) * done.held_out_errors[0]
    assert jnp.all(done.matrix[:, 9:] == 0)
    assert jnp.linalg.matrix_rank(done.matrix[:, 6:9], rtol=1e-8) == 1


def test_tight_steps_never_raise_the_training_error():
    problem = rows(D, 0)
    stats, structure, m, bias = start(problem)
    options = RefineOptions(steps=8, pull_steps=0, over_relaxation=1.0)
    done = refine(problem, problem, stats, structure, m, bias, 1.0, options)
    assert jnp.all(jnp.diff(done.held_out_errors) <= 1e-12)


def test_without_activation_the_linear_optimum_is_a_fixed_point():
    problem = rows(D, 0, IDENTITY)
    stats, structure, m, bias = start(problem)
    done = refine(problem, problem, stats, structure, m, bias, 1.0, RefineOptions(steps=3))
    np.testing.assert_allclose(done.held_out_errors, done.held_out_errors[0], rtol=1e-6)


def test_full_blend_with_the_linear_response_returns_the_linear_fit():
    problem = rows(D, 0)
    stats, structure, m, bias = start(problem)
    done = refine(problem, problem, stats, structure, jnp.where(m != 0, m + 0.1, m), bias, 0.0, RefineOptions(steps=1))
    fitted_error = relative_error(problem, m, bias)
    np.testing.assert_allclose(done.held_out_errors[1], fitted_error, rtol=1e-6)


def test_blend_rule():
    assert blend_for(30_000, 0.25, 200) == 1.0
    assert blend_for(8_000, 0.25, 200) == 0.8


def test_compiled_once_for_other_structures_and_blends():
    problem = rows(512, 0)
    count = refine._cache_size()
    for kept, blend in ((5, 1.0), (4, 0.8), (0, 0.9)):
        stats, structure, m, bias = start(problem, kept)
        refine(problem, problem, stats, structure, m, bias, blend)
    assert refine._cache_size() == count + 1


def test_float32():
    problem = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), rows(D, 0))
    stats, structure, m, bias = start(problem)
    done = refine(problem, problem, stats, structure, m, bias, 1.0)
    assert done.matrix.dtype == jnp.float32
    assert jnp.min(done.held_out_errors) < done.held_out_errors[0]
