"""Quadratic models: their L steps minimise what they say, and the alternation finds what is known to be best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers.compressions import AdaptiveCodebook, LowRank, OptimalCodebook, PenaltyL1, PruneL0
from solvers.kronecker import KroneckerTaylor, kronecker
from solvers.taylor import Quadratic, Taylor, alternate
from solvers.taylor_solutions import solve


def diagonal(seed=0, shape=(4, 3), least=0.1):
    rng = np.random.default_rng(seed)
    w, g = (jnp.asarray(rng.normal(size=shape)) for _ in range(2))
    return Taylor(w, 0.1 * g, jnp.asarray(rng.uniform(least, 2, size=shape)))


def factors(seed=0, p=4, n=3):
    rng = np.random.default_rng(seed)
    w, g = (rng.normal(size=(p, n)) for _ in range(2))
    inputs, outputs = (m.T @ m / 9 for m in (rng.normal(size=(9, p)), rng.normal(size=(9, n))))
    return w, g, inputs, outputs


def correlated(seed=0, p=4, n=3):
    return kronecker(*map(jnp.asarray, factors(seed, p, n)))


MODELS = {"diagonal": diagonal, "negative curvature": lambda: diagonal(least=-0.4), "kronecker": correlated}


@pytest.mark.parametrize("name", MODELS)
def test_l_steps_minimise_the_model_and_the_penalty(name):
    model, rng = MODELS[name](), np.random.default_rng(1)
    assert isinstance(model, Quadratic)
    target = jnp.asarray(rng.normal(size=model.w.shape))
    for mu in (0.5, 3.0, 1e4):
        value = lambda w, mu=mu: model.value(w) + mu / 2 * jnp.sum((w - target) ** 2)  # noqa: E731
        w = model.l_step(target, mu)
        assert float(jnp.abs(jax.grad(value)(w)).max()) < 1e-9 * mu
        others = w[None] + jnp.asarray(0.1 * rng.normal(size=(50, *w.shape)))
        assert float(value(w)) <= float(jax.vmap(value)(others).min())


def test_the_l_step_with_multipliers_is_the_formula():
    """w = (h w + mu Delta + dual - g) / (h + mu), with target = Delta + dual / mu."""
    model, mu = diagonal(), 0.7
    delta, dual = (jnp.asarray(np.random.default_rng(s).normal(size=model.w.shape)) for s in (1, 2))
    expected = (model.h * model.w + mu * delta + dual - model.g) / (model.h + mu)
    np.testing.assert_allclose(model.l_step(delta + dual / mu, mu), expected, rtol=1e-12)


def test_the_value_is_the_second_order_expansion():
    """Of a function that is a quadratic: the model is exact."""
    model = diagonal()
    w = jnp.asarray(np.random.default_rng(3).normal(size=model.w.shape))
    exact = sum(
        g * (x - c) + h / 2 * (x - c) ** 2
        for x, c, g, h in zip(*map(np.ravel, (w, model.w, model.g, model.h)), strict=True)
    )
    assert float(model.value(w)) == pytest.approx(exact)
    assert float(model.value(model.w)) == 0


def test_flat_weights_stay_where_they_are():
    """h = 0, h < 0, and h below the rounding of the largest: no minimum that could be trusted."""
    w, g, h = (
        jnp.array(v) for v in ([1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 0.5, 0.5, 0.5, 0.0], [2.0, 0.0, -1.0, 1e-17, 0.0])
    )
    model = Taylor(w, g, h)
    np.testing.assert_allclose(model.minimum(), [0.75, 2, 3, 4, 5])
    np.testing.assert_array_equal(model.curvature(), [2, 0, 0, 0, 0])
    at_zero = -g * w + h / 2 * w**2
    np.testing.assert_allclose(model.saliency(), [2 / 2 * 0.75**2, *at_zero[1:]])
    damped = model.damped(0.25)
    np.testing.assert_allclose(damped.h, [2.25, 0.25, 0.25, 0.25, 0.25])
    np.testing.assert_allclose(damped.minimum(), w - g / damped.h)


def test_saliency_is_what_a_weight_at_zero_costs():
    model = diagonal()
    best = model.minimum()
    for i in range(4):
        gain = model.value(best.at[i, 0].set(0.0)) - model.value(best)
        assert float(model.saliency()[i, 0]) == pytest.approx(float(gain))
    obd = model.without_gradient()
    np.testing.assert_allclose(obd.saliency(), obd.h * obd.w**2 / 2)


def test_kronecker_against_the_full_matrix():
    w, g, inputs, outputs = factors()
    model = correlated()
    full = np.kron(inputs, outputs)  # of vectors in row-major order
    change = np.random.default_rng(4).normal(size=w.shape)
    expected = g.ravel() @ change.ravel() + change.ravel() @ full @ change.ravel() / 2
    assert float(model.value(jnp.asarray(w + change))) == pytest.approx(expected)
    target, mu = np.random.default_rng(5).normal(size=w.shape), 0.3
    exact = np.linalg.solve(full + mu * np.eye(w.size), full @ w.ravel() + mu * target.ravel() - g.ravel())
    np.testing.assert_allclose(model.l_step(jnp.asarray(target), mu), exact.reshape(w.shape), rtol=1e-8)
    np.testing.assert_allclose(model.minimum(), w - np.linalg.solve(full, g.ravel()).reshape(w.shape), rtol=1e-8)
    shifted = model.damped(0.5)
    damped = np.linalg.solve(full + 0.5 * np.eye(w.size), g.ravel()).reshape(w.shape)
    np.testing.assert_allclose(shifted.minimum(), w - damped, rtol=1e-8)
    assert not model.without_gradient().g.any()


def test_kronecker_with_dead_inputs():
    """Inputs that are always 0 have no curvature: their weights cost nothing, and do not move."""
    w, g, inputs, outputs = factors()
    inputs[0], inputs[:, 0], g[0] = 0, 0, 0
    model = kronecker(*map(jnp.asarray, (w, g, inputs, outputs)))
    assert float(model.value(jnp.asarray(w).at[0].add(10.0))) == pytest.approx(0, abs=1e-9)
    assert isinstance(model, KroneckerTaylor)
    assert bool((model.h >= 0).all())


MUS = np.geomspace(1e-2, 1e3, 120)


@pytest.mark.parametrize("form", [PruneL0(5), AdaptiveCodebook(3), LowRank(1)])
@pytest.mark.parametrize("name", ["diagonal", "kronecker"])
def test_alternation_improves_on_direct_compression(form, name):
    model = correlated(p=8, n=6) if name == "kronecker" else diagonal(shape=(8, 6))
    found = alternate(model, model.w, form, jnp.asarray(MUS))
    direct = float(model.value(form.decompress(form.compress(model.w, 0.0))))
    assert float(found.loss) == pytest.approx(float(model.value(form.decompress(found.theta))))
    assert float(found.loss) < direct
    assert found.gaps.shape == MUS.shape
    assert float(found.gaps[-1]) < 1e-2


def test_alternation_is_exact_where_the_problem_is_convex():
    """alpha sum |x| with a diagonal model: soft thresholds of alpha / h."""
    model, alpha = diagonal(shape=(30,)), 0.3
    found = alternate(model, model.w, PenaltyL1(alpha), jnp.asarray(MUS))
    minimum = model.minimum()
    exact = jnp.sign(minimum) * jnp.maximum(jnp.abs(minimum) - alpha / model.h, 0)
    np.testing.assert_allclose(found.theta, exact, atol=1e-3)


@pytest.mark.parametrize("form", [PruneL0(40), OptimalCodebook(4), AdaptiveCodebook(4)])
@pytest.mark.parametrize("augmented", [True, False])
def test_alternation_never_beats_the_exact_solution_and_comes_near(form, augmented):
    model = diagonal(shape=(200,))
    best = float(model.value(form.decompress(solve(form, model))))
    found = float(alternate(model, model.w, form, jnp.asarray(MUS), augmented=augmented).loss)
    least = float(model.value(model.minimum()))
    assert best <= found + 1e-9
    assert found - least < 1.25 * (best - least)


def test_alternation_compiles_once_for_all_models():
    form = PruneL0(7)
    alternate(diagonal(0), diagonal(0).w, form, jnp.asarray(MUS))
    before = alternate._cache_size()
    alternate(diagonal(1), diagonal(1).w, form, jnp.asarray(2 * MUS))
    assert alternate._cache_size() == before
