import jax
import jax.numpy as jnp
import numpy as np

from solvers.lbfgs import minimise


def _quadratic(seed: int = 0, condition: float = 300.0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    hessian = jnp.asarray((basis * np.geomspace(1, condition, 12)) @ basis.T)
    target = jnp.asarray(rng.normal(size=(3, 4)))

    def evaluate(x):
        gap = (x - target).reshape(-1)
        return 0.5 * gap @ hessian @ gap, (hessian @ gap).reshape(3, 4)

    return evaluate, target


def test_reaches_the_minimum_of_an_ill_conditioned_quadratic():
    evaluate, target = _quadratic()
    point, value = jax.jit(
        lambda x: minimise(evaluate, x, offset=jnp.zeros(()), max_steps=200, rtol=1e-12, curvature=100.0)
    )(jnp.zeros((3, 4)))
    np.testing.assert_allclose(point, target, atol=1e-6)
    assert value < 1e-10


def test_beats_gradient_descent_at_equal_evaluations():
    evaluate, _ = _quadratic()
    x = jnp.zeros((3, 4))
    for _ in range(30):
        x = x - evaluate(x)[1] / 300.0
    _, value = minimise(evaluate, jnp.zeros((3, 4)), offset=jnp.zeros(()), max_steps=30, curvature=300.0)
    assert value < 0.01 * evaluate(x)[0]


def test_value_never_rises_and_belongs_to_the_point():
    def evaluate(x):  # not convex; the first step is far too long
        return jnp.sum(jnp.cos(3 * x) + x * x), -3 * jnp.sin(3 * x) + 2 * x

    start = jnp.linspace(-2, 2, 6).reshape(2, 3)
    previous = evaluate(start)[0]
    for steps in (2, 40):
        point, value = minimise(evaluate, start, offset=jnp.asarray(10.0), max_steps=steps, curvature=0.1)
        np.testing.assert_allclose(value, evaluate(point)[0], rtol=1e-12)
        assert value <= previous
        previous = value
    assert jnp.linalg.norm(evaluate(point)[1]) < 0.1


def test_stops_early_when_a_step_gains_little():
    evaluate, target = _quadratic(condition=3.0)
    loose, _ = minimise(evaluate, jnp.zeros((3, 4)), offset=jnp.asarray(1e6), max_steps=100, rtol=1e-2)
    tight, _ = minimise(evaluate, jnp.zeros((3, 4)), offset=jnp.zeros(()), max_steps=100, rtol=1e-9)
    assert jnp.linalg.norm(loose - target) > 10 * jnp.linalg.norm(tight - target)


def test_a_start_without_a_value_is_reported():
    def evaluate(x):
        return jnp.sum(jnp.log(x)), 1 / x

    _, value = minimise(evaluate, -jnp.ones((2, 2)), offset=jnp.zeros(()))
    assert value == jnp.inf
