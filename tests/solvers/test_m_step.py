from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from solvers.activation import IDENTITY, NAMED, RELU, Activation
from solvers.m_step import ExactLinear, MajorizeMinimize
from solvers.reconstruction import (
    LayerProblem,
    descent_residual,
    loss,
    scale_features,
    surrogate_gradient,
    validate,
)
from solvers.sgd import Sgd, max_eigenvalue

D, P, N = 50, 9, 6
KEY = 3


def layer(activation: Activation, *, seed: int = 0, d: int = D, extras: bool = True) -> tuple[LayerProblem, jax.Array]:
    rng = np.random.default_rng(seed)
    x, w, bias = rng.normal(size=(d, P)), rng.normal(size=(N, P)), rng.normal(size=N)
    offset = rng.normal(size=(d, N))
    z = x @ w.T + bias + (offset if extras else 0) + 0.2 * rng.normal(size=(d, N))
    problem = LayerProblem(
        x=jnp.asarray(x),
        y=activation(jnp.asarray(z)),
        bias=jnp.asarray(bias),
        offset=jnp.asarray(offset) if extras else None,
        weights=jnp.asarray(rng.uniform(0.2, 2, size=N)) if extras else None,
        activation=activation,
    )
    return problem, jnp.asarray(w)


def run(m_step, problem, m, target, t, steps):
    return run_compiled(m_step, steps, problem, m, target, t)


@partial(jax.jit, static_argnums=(0, 1))
def run_compiled(m_step, steps, problem, m, target, t):
    """The final state with the m of every step, (steps + 1, n, p), as its field `m`."""
    prepared = m_step.prepare(problem)
    state = m_step.init(problem, prepared, m, jax.random.key(KEY), t)

    def body(state, _):
        state = m_step.step(problem, prepared, state, target, t)
        return state, state.m

    state, rest = lax.scan(body, state, None, length=steps)
    return state._replace(m=jnp.concatenate([m[None], rest]))


def objective(problem, m, target, t):
    return loss(problem, m) + t / 2 * jnp.sum((m - target) ** 2)


def exact_minimiser(problem, target, t):
    x, y, scale = np.asarray(problem.x), np.asarray(problem.y), np.ones(N)
    if problem.weights is not None:
        scale = np.asarray(problem.weights)
    shifted = y - np.asarray(problem.bias) - (0 if problem.offset is None else np.asarray(problem.offset))
    energy = np.sum(scale * y**2)
    rows = [
        np.linalg.solve(s / energy * x.T @ x + t * np.eye(P), s / energy * shifted[:, i] @ x + t * target[i])
        for i, s in enumerate(scale)
    ]
    return np.stack(rows)


@pytest.mark.parametrize("m_step", [MajorizeMinimize(), ExactLinear()], ids=["mm", "exact"])
@pytest.mark.parametrize(("d", "extras"), [(D, True), (5, False), (4, True), (3, False)])
def test_without_activation_one_step_is_exact(m_step, extras, d):
    problem, w = layer(IDENTITY, d=d, extras=extras)
    target, t = 0.5 * w, jnp.asarray(0.03)
    last = run(m_step, problem, jnp.zeros_like(w), target, t, 1).m[-1]
    np.testing.assert_allclose(last, exact_minimiser(problem, np.asarray(target), 0.03), rtol=1e-9, atol=1e-11)


def test_cholesky_reaches_the_same_point_and_follows_t():
    problem, w = layer(IDENTITY)
    m_step = MajorizeMinimize(factorization="cholesky", momentum=0.0)
    prepared = m_step.prepare(problem)
    state = m_step.init(problem, prepared, jnp.zeros_like(w), jax.random.key(0), jnp.asarray(1.0))
    advance = jax.jit(lambda s, t: m_step.step(problem, prepared, s, 0.5 * w, t))
    for _ in range(60):  # the largest weight bounds all: not exact in one step
        state = advance(state, jnp.asarray(0.03))
    np.testing.assert_allclose(state.m, exact_minimiser(problem, 0.5 * np.asarray(w), 0.03), rtol=1e-7, atol=1e-9)
    unweighted, w = layer(IDENTITY, extras=False)
    first = run(m_step, unweighted, jnp.zeros_like(w), 0.5 * w, jnp.asarray(0.03), 1).m[-1]
    np.testing.assert_allclose(first, exact_minimiser(unweighted, 0.5 * np.asarray(w), 0.03), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(2))
def test_relu_objective_never_rises_and_ends_stationary(seed):
    problem, w = layer(RELU, seed=seed)
    target, t = 0.3 * w, jnp.asarray(0.02)
    state = run(MajorizeMinimize(pull_steps=5), problem, jnp.zeros_like(w), target, t, 200)
    values = np.asarray(jax.vmap(lambda m: objective(problem, m, target, t))(state.m))
    assert np.all(np.diff(values) <= 1e-10 * values[:-1])
    assert values[-1] < 0.9 * values[0]
    gradient = jax.grad(objective, argnums=1)(problem, state.m[-1], target, t)
    start = jax.grad(objective, argnums=1)(problem, 0.9 * w, target, t)
    assert jnp.linalg.norm(gradient) < 1e-4 * jnp.linalg.norm(start)
    np.testing.assert_allclose(state.loss, loss(problem, state.m[-1]), rtol=1e-12)


def test_safeguard_is_used_where_pull_would_raise_the_objective():
    # One output that should be slightly active at a response far below zero, and another row that pays for it.
    problem = LayerProblem(
        x=jnp.array([[1.0], [1.0]]), y=jnp.array([[0.5], [0.0]]), bias=jnp.array([-1.0]), activation=RELU
    )
    m, target, t = jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.asarray(1e-3)
    residual = descent_residual(RELU, problem.y, jnp.full((2, 1), -1.0), pull=True)
    pulled = m + jnp.sum(residual) / (2 + 1e-3 * 0.25)
    assert objective(problem, pulled, target, t) > objective(problem, m, target, t)  # what pull alone would do
    last = run(MajorizeMinimize(momentum=0.0), problem, m, target, t, 1).m[-1]
    assert objective(problem, last, target, t) <= objective(problem, m, target, t)


@pytest.mark.parametrize("pull", [False, True])
def test_residual_is_the_gradient_of_a_bound(pull):
    rng = np.random.default_rng(0)
    y = jnp.asarray(np.maximum(rng.normal(size=(40, 30)), 0))
    z, other = jnp.asarray(rng.normal(size=(2, 40, 30)))
    target = z + descent_residual(RELU, y, z, pull)

    def value(v):
        return 0.5 * (y - jnp.maximum(v, 0)) ** 2

    touches = (z >= 0) | (y == 0) | (not pull)
    gap = 0.5 * (target - z) ** 2 - value(z)
    bound = 0.5 * (target - other) ** 2 - jnp.where(touches, gap, 0)
    assert jnp.all(jnp.where(touches, bound - value(other), 0) >= -1e-12)
    if not pull:
        np.testing.assert_allclose(z - target, jax.grad(lambda v: jnp.sum(value(v)))(z), atol=1e-12)


def test_surrogate_gradient_without_pull_cases_is_the_loss_gradient():
    for activation in (IDENTITY, NAMED["tanh"], NAMED["gelu"]):
        problem, w = layer(activation)
        expected = jax.grad(loss, argnums=1)(problem, 0.5 * w)
        np.testing.assert_allclose(surrogate_gradient(problem, 0.5 * w), expected, atol=1e-12)


def test_relu_loss_is_not_convex_in_m():
    # One row, one weight: x = 1, y = 1. The loss is flat for m < 0 and falls on (0, 1).
    problem = LayerProblem(x=jnp.ones((1, 1)), y=jnp.ones((1, 1)), bias=jnp.zeros(1), activation=RELU)
    low, middle, high = (float(loss(problem, jnp.full((1, 1), m))) for m in (-1.0, 0.0, 1.0))
    assert (low, middle, high) == (0.5, 0.5, 0.0)
    assert middle > (low + high) / 2
    gradient = jax.grad(loss, argnums=1)(problem, jnp.full((1, 1), -1.0))
    assert float(gradient[0, 0]) == 0.0  # a stationary point that is not a minimum


@pytest.mark.parametrize("name", sorted(NAMED))
def test_sgd_decreases_the_loss_for_every_activation(name):
    problem, w = layer(NAMED[name])
    m_step = Sgd(batch_size=16, steps=20, learning_rate=0.1)
    m_step.check(problem)
    state = run(m_step, problem, 0.3 * w, 0.3 * w, jnp.asarray(1e-6), 8)
    assert loss(problem, state.m[-1]) < 0.8 * loss(problem, 0.3 * w)


def test_sgd_is_deterministic_for_a_key_and_takes_any_optimiser():
    problem, w = layer(RELU, extras=False)
    t = jnp.asarray(1e-3)
    adam = Sgd(batch_size=64, steps=10, learning_rate=0.01, optimizer=optax.adam)  # more than d rows: capped
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam mixes its step count with floats
        first, second = (run(adam, problem, 0.5 * w, 0.5 * w, t, 3).m[-1] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert loss(problem, first) < loss(problem, 0.5 * w)


def test_sgd_gradient_is_unbiased():
    problem, w = layer(NAMED["tanh"])
    t, many = jnp.asarray(0.1), 1000
    one = Sgd(batch_size=8, steps=1, learning_rate=0.1, optimizer=optax.sgd)
    prepared = one.prepare(problem)
    rate = 0.1 / (prepared.max_curvature + t)

    def move(key):
        state = one.init(problem, prepared, 0.5 * w, key, t)
        return (0.5 * w - one.step(problem, prepared, state, w, t).m) / rate

    moves = jax.jit(jax.vmap(move))(jax.random.split(jax.random.key(0), many))
    expected = jax.grad(objective, argnums=1)(problem, 0.5 * w, w, t)
    error = jnp.linalg.norm(jnp.mean(moves, axis=0) - expected) / jnp.linalg.norm(moves - expected[None])
    assert error < 3 / many  # standard error of a mean: spread / sqrt(many), and the norm above sums over `many`
    assert jnp.linalg.norm(expected) > 0


def test_power_iteration_finds_the_largest_eigenvalue():
    x = layer(RELU)[0].x
    exact = np.linalg.eigvalsh(np.asarray(x.T @ x))[-1]
    found = float(max_eigenvalue(x, jax.random.key(0)))
    assert 0.95 * exact < found <= exact * (1 + 1e-12)
    assert float(max_eigenvalue(jnp.zeros_like(x), jax.random.key(0))) == 0


def test_unsupported_problems_are_refused_with_the_remedy():
    tanh, relu = layer(NAMED["tanh"])[0], layer(RELU)[0]
    with pytest.raises(ValueError, match=r"tanh.*Sgd"):
        MajorizeMinimize().check(tanh)
    with pytest.raises(ValueError, match=r"relu.*MajorizeMinimize"):
        ExactLinear().check(relu)
    negative = LayerProblem(x=relu.x, y=relu.y - 1, bias=relu.bias)
    with pytest.raises(ValueError, match="negative entry"):
        MajorizeMinimize().check(negative)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: MajorizeMinimize(momentum=1.0), "momentum"),
        (lambda: MajorizeMinimize(pull_steps=-1), "pull_steps"),
        (lambda: MajorizeMinimize(factorization="lu"), "factorization"),
        (lambda: Sgd(learning_rate=0.0), "learning_rate"),
        (lambda: Sgd(batch_size=0), "batch_size"),
        (lambda: Sgd(steps=0), "steps"),
    ],
)
def test_options_out_of_range_are_refused(make, name):
    with pytest.raises(Exception, match=name):
        make()


def test_scaled_features_have_equal_energy():
    problem, w = layer(RELU)
    problem = LayerProblem(x=problem.x.at[:, 0].set(0), y=problem.y, bias=problem.bias)
    scaled, scale = scale_features(problem)
    energy = jnp.sum(scaled.x**2, axis=0)
    np.testing.assert_allclose(energy[1:], energy[1])
    np.testing.assert_allclose(loss(scaled, w * scale[None, :]), loss(problem, w))
    assert scale[0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros(3)}, "x has shape"),
        ({"y": np.zeros((D, N + 1))}, r"y has shape \(50, 7\), expected \(50, 6\)"),
        ({"x": np.zeros((0, P)), "y": np.zeros((0, N)), "offset": None}, "x is empty"),
        ({"bias": np.zeros(N, np.float32)}, "bias has dtype float32"),
        ({"y": np.full((D, N), np.nan)}, "y holds NaN or Inf"),
        ({"weights": np.full(N, -1.0)}, "weights has a negative entry"),
    ],
)
def test_validate_names_the_argument(changes, message):
    problem, _ = layer(RELU)
    bad = object.__new__(LayerProblem)  # past the type checks of the test run: users have none
    for name, value in {**vars(problem), **changes}.items():
        object.__setattr__(bad, name, value)
    with pytest.raises(ValueError, match=message):
        validate(bad)
    validate(problem)
