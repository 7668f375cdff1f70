"""Quadratic models of networks against automatic differentiation, and compression by them alone."""

import dataclasses

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from networks import Fn, build, conv, linear

from solvers.compressions import AdaptiveCodebook, Additive, LowRank, OptimalCodebook, PruneL0, ScaledBinary
from solvers.output_loss import LOSSES
from unified_approx import evaluate, zoo
from unified_approx.calling import forward
from unified_approx.learning_compression import Task, TaylorLStep, fast_lc, lc, load_taylor, taylor_of
from unified_approx.learning_compression.curvature import prepare
from unified_approx.learning_compression.fast import DAMPING, MU_SCHEDULE
from unified_approx.learning_compression.tasks import resolve
from unified_approx.learning_compression.taylor import hessian
from unified_approx.pieces import parameters_of, with_values

EXAMPLES = 7


def depthwise():
    return Fn(lambda m, x: m.fc(nnx.relu(m.a(x)).mean((1, 2))), a=conv(3, 6, feature_group_count=3), fc=linear(6, 3))


def layer_norm():
    parts = {"a": linear(6, 5), "n": nnx.LayerNorm(5, rngs=nnx.Rngs(0)), "b": linear(5, 3)}
    return Fn(lambda m, x: m.b(nnx.relu(m.n(m.a(x)))), **parts)


def twice():
    """A layer that sees its own output: one kernel, two calls."""
    return Fn(lambda m, x: m.out(jnp.tanh(m.a(jnp.tanh(m.a(x))))), a=linear(6, 6), out=linear(6, 3))


def tied():
    """A kernel that is read outside its layer as well."""
    return Fn(lambda m, x: (jnp.tanh(m.a(x)) @ m.a.kernel[...].T)[:, :3], a=linear(6, 5))


def transformed(transform):
    def call(m, x):
        return m.b(jnp.tanh(transform(lambda layer, x: layer(x))(m.a, x)))

    return Fn(call, a=linear(6, 5), b=linear(5, 3))


def sequence():
    """Dense layers on (batch, time, features), and on both leading axes merged."""

    def call(m, x):
        x = jnp.tanh(m.a(x.reshape(len(x), 3, 2)))
        return m.b(jnp.tanh(m.c(x.reshape(-1, 4)).reshape(-1, 12)))

    return Fn(call, a=linear(2, 4), c=linear(4, 4), b=linear(12, 3))


FLAT, IMAGE, LARGE = (6,), (4, 4, 3), (8, 8, 3)
# Network, shape of an example, parameters that no probe may claim.
NETWORKS = {
    "mlp": (networks.mlp, FLAT, set()),
    "containers": (networks.containers, FLAT, set()),
    "convolutions with biases": (networks.lenet, LARGE, set()),
    "batch norms": (lambda: networks.vgg(True), LARGE, set()),
    "sequence": (sequence, FLAT, set()),
    "nnx.jit": (lambda: transformed(nnx.jit), FLAT, set()),
    "nnx.remat": (lambda: transformed(nnx.remat), FLAT, set()),
    "depthwise": (depthwise, IMAGE, {("a", "kernel"), ("a", "bias")}),
    "layer norm": (layer_norm, FLAT, {("n", "scale"), ("n", "bias")}),
    "called twice": (twice, FLAT, {("a", "kernel"), ("a", "bias")}),
    "tied": (tied, FLAT, {("a", "kernel"), ("a", "bias")}),
    "under vmap": (networks.vmapped, IMAGE, {("a", "kernel"), ("a", "bias"), ("bn", "scale"), ("bn", "bias")}),
    "a single layer": (lambda: linear(6, 3), FLAT, {("kernel",), ("bias",)}),
}


def problem(name, seed=0):
    make, shape, _ = NETWORKS[name]
    rng = np.random.default_rng(seed)
    model = build(make)
    model.eval()
    x = rng.normal(size=(EXAMPLES, *shape)).astype(np.float32)
    classes = np.asarray(model(jnp.asarray(x))).reshape(EXAMPLES, -1).shape[1]
    return model, x, rng.integers(0, classes, EXAMPLES)


def jacobians(model, x):
    """Outputs (examples, c) and their derivatives, (examples, c, *shape) by parameter."""
    values = parameters_of(model)
    own = nnx.clone(model)
    own.eval()
    outputs = lambda v: own_outputs(own, v, x)  # noqa: E731
    return np.asarray(outputs(values), np.float64), jax.tree.map(
        lambda a: np.asarray(a, np.float64), jax.jit(jax.jacrev(outputs))(values)
    )


def own_outputs(model, values, x):
    return with_values(model, values)(jnp.asarray(x)).reshape(len(x), -1)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def assert_close(found, expected, tolerance=2e-3):
    assert set(found) == set(expected)
    for path, value in expected.items():
        assert found[path].shape == value.shape
        size = max(np.linalg.norm(value), 1e-12)
        assert np.linalg.norm(np.asarray(found[path]) - value) <= tolerance * size, path


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_and_curvature_against_the_jacobians(name):
    """Batches of 3 for 7 examples: the last one is filled up, and counts only what is real."""
    model, x, y = problem(name)
    z, jacobian = jacobians(model, x)
    p, residuals = softmax(z), softmax(z) - np.eye(z.shape[1])[y]
    outer = np.einsum("bc,cd->bcd", p, np.eye(z.shape[1])) - np.einsum("bc,bd->bcd", p, p)
    assert set(unclaimed(model, x)) == NETWORKS[name][2]
    exact = taylor_of(model, x, y, batch_size=3)
    assert exact.loss == pytest.approx(-np.log(p[np.arange(EXAMPLES), y]).mean(), rel=1e-4)
    gradient = {path: np.einsum("bc,bc...->...", residuals, j) / EXAMPLES for path, j in jacobian.items()}
    assert_close({path: part.g for path, part in exact.parts.items()}, gradient)
    gauss_newton = {path: np.einsum("bcd,bc...,bd...->...", outer, j, j) / EXAMPLES for path, j in jacobian.items()}
    assert_close({path: part.h for path, part in exact.parts.items()}, gauss_newton)


def unclaimed(model, x):
    """Parameters that no probe understands."""
    own = nnx.clone(model)
    own.eval()
    options = {"call": forward, "loss": LOSSES["cross_entropy"], "samples": 1, "factors": False}
    return prepare(own, jnp.asarray(x[:3]), curvature="fisher", **options)[0].rest


def test_the_empirical_fisher_matrix_against_the_jacobians():
    model, x, y = problem("convolutions with biases")
    z, jacobian = jacobians(model, x)
    residuals = softmax(z) - np.eye(z.shape[1])[y]
    fisher = {path: (np.einsum("bc,bc...->b...", residuals, j) ** 2).mean(axis=0) for path, j in jacobian.items()}
    found = taylor_of(model, x, y, curvature="fisher", batch_size=3)
    assert_close({path: part.h for path, part in found.parts.items()}, fisher)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_sampled_labels_approach_the_exact_curvature(loss):
    model, x, y = problem("mlp")
    targets = y if loss == "cross_entropy" else np.eye(3, dtype=np.float32)[y]
    exact = taylor_of(model, x, targets, loss=loss)
    errors = []
    for samples in (1, 100):
        found = taylor_of(model, x, targets, loss=loss, curvature="monte_carlo", samples=samples, seed=1)
        gaps = [(float(jnp.sum((found.parts[p].h - e.h) ** 2)), float(jnp.sum(e.h**2))) for p, e in exact.parts.items()]
        errors.append(np.sqrt(sum(g for g, _ in gaps) / sum(s for _, s in gaps)))
    assert errors[1] < 0.3
    assert errors[1] < 0.5 * errors[0]
    again = taylor_of(model, x, targets, loss=loss, curvature="monte_carlo", samples=100, seed=1)
    np.testing.assert_array_equal(again.parts["a", "kernel"].h, found.parts["a", "kernel"].h)


def test_the_hessian_of_a_linear_model_is_the_gauss_newton_form():
    model, x, y = Fn(lambda m, x: m.a(x), a=linear(6, 3)), *problem("mlp")[1:]
    for loss, targets in (("cross_entropy", y), ("squared_error", np.eye(3)[y])):
        full = taylor_of(model, x, targets, curvature="hessian", loss=loss)
        assert_close(
            {path: part.h for path, part in taylor_of(model, x, targets, loss=loss).parts.items()},
            {path: np.asarray(part.h) for path, part in full.parts.items()},
        )


def test_the_full_hessian_is_the_second_derivative_of_the_loss():
    """Along random directions, by differences of gradients."""
    model, x, y = problem("mlp")
    full = np.asarray(hessian(model, x, y), np.float64)
    values, step = parameters_of(model), 1e-2
    rng = np.random.default_rng(0)
    direction = {path: rng.normal(size=value.shape).astype(np.float32) for path, value in values.items()}
    sides = []
    for sign in (1, -1):
        moved = with_values(model, {path: value + sign * step * direction[path] for path, value in values.items()})
        sides.append(np.concatenate([np.ravel(p.g) for p in taylor_of(moved, x, y, curvature="none").parts.values()]))
    along = full @ np.concatenate([direction[path].ravel() for path in values])
    assert np.linalg.norm((sides[0] - sides[1]) / (2 * step) - along) < 0.02 * np.linalg.norm(along)
    found = taylor_of(model, x, y, curvature="hessian")
    np.testing.assert_allclose(np.concatenate([np.ravel(p.h) for p in found.parts.values()]), np.diag(full), atol=1e-6)
    assert not any(part.h.any() for part in taylor_of(model, x, y, curvature="none").parts.values())


def test_without_labels_the_gradient_is_taken_for_zero():
    model, x, y = problem("mlp")
    found, known = taylor_of(model, x), taylor_of(model, x, y)
    assert found.loss == 0
    for path, part in found.parts.items():
        assert not part.g.any()
        np.testing.assert_array_equal(part.h, known.parts[path].h)


def test_kronecker_is_exact_for_a_linear_model_with_squared_error():
    model, x, y = Fn(lambda m, x: m.a(x), a=linear(6, 3)), *problem("mlp")[1:]
    targets = np.eye(3, dtype=np.float32)[y]
    found = taylor_of(model, x, targets, loss="squared_error", structure="kronecker", batch_size=3)
    kernel = parameters_of(model)["a", "kernel"]
    change = np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)
    z = np.asarray(model(jnp.asarray(x)), np.float64)
    losses = [np.mean(np.sum((out - targets) ** 2, axis=1)) / 2 for out in (z, z + x @ change)]
    assert float(found.value({("a", "kernel"): kernel + change})) == pytest.approx(losses[1] - losses[0], rel=1e-4)


def test_kronecker_factors_of_a_convolution():
    """With a squared error on the pixels the outputs' factor is the identity; the inputs' is the patches' moment."""
    model = Fn(lambda m, x: m.a(x), a=conv(3, 2, padding="VALID"))
    x = np.random.default_rng(0).normal(size=(5, 4, 4, 3)).astype(np.float32)
    part = taylor_of(model, x, loss="squared_error", structure="kronecker", batch_size=2).parts["a", "kernel"]
    rows = np.array([x[b, i : i + 3, j : j + 3].ravel() for b in range(5) for i in range(2) for j in range(2)])
    full = np.kron(rows.T @ rows / 5, np.eye(2))
    change = np.random.default_rng(1).normal(size=(27, 2))
    assert float(part.value(part.w + change)) == pytest.approx(change.ravel() @ full @ change.ravel() / 2, rel=1e-3)


@pytest.fixture(scope="module")
def models(digits):
    model, x, y, *_ = digits
    return {s: taylor_of(model, x[:500], y[:500], structure=s) for s in ("diagonal", "kronecker")}


TASKS = {
    "prune": [Task(path="conv.|fc", compression=PruneL0(3000), view="vector", joint=True)],
    "quantize": [Task(path="conv.|fc", compression=AdaptiveCodebook(2))],
    "low rank": [Task(path="conv[23]", compression=LowRank(6))],
    "mixed": [
        Task(path="conv2", compression=LowRank(8)),
        Task(path="conv3", compression=Additive((OptimalCodebook(2), PruneL0(200)), rounds=2)),
        Task(path="fc", compression=ScaledBinary()),
    ],
}


def direct(model, tasks):
    """Compressed without knowing the loss."""
    values = dict(parameters_of(model))
    for piece in resolve(tasks, model):
        values |= piece.decompress(piece.compression.compress(piece.pack(values), 0.0))
    return with_values(model, values)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("name", TASKS)
def test_fast_lc_beats_direct_compression_by_its_own_measure(digits, models, name, structure):
    model, taylor = digits[0], models[structure]
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    result = fast_lc(model, TASKS[name], taylor, mu_schedule=MU_SCHEDULE[::3])
    damped = TaylorLStep(taylor.map(lambda part: part.without_gradient()))
    assert damped.measure(result.model) < damped.measure(direct(model, TASKS[name]))
    values = parameters_of(result.model)
    for piece, theta in zip(result.pieces, result.thetas, strict=True):
        np.testing.assert_allclose(piece.pack(values), piece.compression.decompress(theta), atol=1e-6)
    named = {path for piece in result.pieces for path in piece.paths}
    for path, value in parameters_of(model).items():
        assert path in named or np.array_equal(value, values[path])
    assert result.cr > 1
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


def test_without_data_the_digits_stay_readable(digits, models):
    """One bit a weight: direct compression, the diagonal model and the Kronecker one, in this order."""
    model, _, _, test, labels = digits
    found = [evaluate.accuracy(direct(model, TASKS["quantize"]), test, labels)]
    for structure in ("diagonal", "kronecker"):
        result = fast_lc(model, TASKS["quantize"], models[structure])
        found.append(evaluate.accuracy(result.model, test, labels))
    assert found[2] > found[0] + 1
    assert found[2] > 90


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_lc_with_this_l_step_is_the_compiled_loop(digits, models, structure):
    model, mus = digits[0], MU_SCHEDULE[::6]
    task = [Task(path="conv2", compression=PruneL0(500))]
    scale = float(models[structure].parts["conv2", "kernel"].curvature().mean())
    damped = models[structure].map(lambda part: part.without_gradient().damped(DAMPING * scale))
    slow = lc(model, task, TaylorLStep(damped), [mu * scale for mu in mus])
    fast = fast_lc(model, task, models[structure], mu_schedule=mus, exact=False)
    a, b = (np.asarray(parameters_of(r.model)["conv2", "kernel"]) for r in (slow, fast))
    assert np.mean((a != 0) != (b != 0)) < 0.01
    assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a)
    assert fast.history[-1].loss == pytest.approx(slow.history[slow.best].loss, rel=1e-2)


def test_free_parameters_move_to_the_minimum_if_asked(digits):
    model, x, y, *_ = digits
    taylor = taylor_of(model, x[:200], y[:200])
    task = [Task(path="conv2", compression=PruneL0(500))]
    moved = parameters_of(fast_lc(model, task, taylor, gradient=True, damping=10.0, move_free=True).model)
    part = taylor.parts["fc", "kernel"]
    expected = part.damped(10.0 * float(part.curvature().mean())).minimum()
    np.testing.assert_allclose(moved["fc", "kernel"], expected, rtol=1e-5)
    step = TaylorLStep(taylor.map(lambda p: p.damped(1.0)), move_free=True)
    same = lc(model, task, step, [1.0]).model
    np.testing.assert_allclose(parameters_of(same)["fc", "kernel"], part.damped(1.0).minimum(), rtol=1e-5)


def test_the_first_order_model(digits):
    """h = 0: the L step goes down the gradient by 1 / mu; nothing flat is moved at once."""
    model, x, y, *_ = digits
    taylor = taylor_of(model, x[:200], y[:200], curvature="none")
    kept = fast_lc(model, [Task(path="conv2", compression=PruneL0(500))], taylor, gradient=True, damping=0.0)
    part = taylor.parts["conv2", "kernel"]
    gains = np.ravel(-part.g * part.w)
    own = np.ravel(parameters_of(kept.model)["conv2", "kernel"])
    assert set(np.flatnonzero(own)) == set(np.argsort(-gains)[:500][np.sort(-gains)[:500] < 0])
    result = lc(model, TASKS["quantize"], TaylorLStep(taylor), [1.0, 10.0, 100.0])
    assert np.isfinite(result.history[-1].loss)


def test_saved_models_need_no_data(digits, models, tmp_path):
    model = digits[0]
    for structure, taylor in models.items():
        file = tmp_path / structure
        assert taylor.save(file) == file.stat().st_size
        again = load_taylor(file, model)
        assert (again.loss, dict(again.origin)) == (taylor.loss, dict(taylor.origin))
        for path, part in taylor.parts.items():
            for name, value in vars(part).items():
                np.testing.assert_array_equal(value, getattr(again.parts[path], name))
    results = [
        fast_lc(model, TASKS["prune"], t) for t in (models["diagonal"], load_taylor(tmp_path / "diagonal", model))
    ]
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(r.model)) for r in results))


def test_files_that_cannot_be_used(digits, models, tmp_path):
    model, file = digits[0], tmp_path / "model"
    models["diagonal"].save(file)
    other = with_values(model, {("fc", "bias"): model.fc.bias[...] + 1e-3})
    with pytest.raises(ValueError, match="made for a network with other weights"):
        load_taylor(file, other)
    with pytest.raises(ValueError, match="made for a network with other weights"):
        fast_lc(other, TASKS["prune"], models["diagonal"])
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_taylor(tmp_path / "none", model)
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no tensors at all"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="no whole file"):
            load_taylor(file, model)
    nnx_file = zoo.entry("digits").weights
    with pytest.raises(ValueError, match="no whole file"):
        load_taylor(nnx_file, model)


BAD = [
    ({"curvature": "newton"}, "curvature: 'newton' is unknown; choose one of gauss_newton"),
    ({"structure": "block"}, "structure: 'block'"),
    ({"loss": "hinge"}, "loss: 'hinge'"),
    ({"samples": 0}, "samples: 0"),
    ({"batch_size": 0}, "batch_size: 0"),
    ({"x": np.zeros((0, 6), np.float32), "y": np.zeros(0, int)}, "x: no examples"),
    ({"y": np.zeros(6, int)}, "one integer label for each of the 7"),
    ({"y": np.zeros(7, np.float32)}, "one integer label"),
    ({"y": np.full(7, 3)}, "labels from 3 to 3 for 3 outputs"),
    ({"y": np.zeros((7, 2)), "loss": "squared_error"}, "give 3 numbers"),
    ({"y": None, "curvature": "fisher"}, "y: None, but curvature='fisher' needs labels"),
    ({"y": None, "curvature": "hessian"}, "y: None"),
    ({"structure": "kronecker", "curvature": "none"}, "structure: 'kronecker' with"),
    ({"call": lambda model, x: (model(x), model(x))}, "call: the network must give one array"),
    ({"y": None, "x": np.zeros((0, 6), np.float32)}, "x: no examples"),
    ({"y": None, "call": lambda model, x: (model(x), model(x))}, "call: the network must give one array"),
    ({"y": None, "call": lambda model, x: model(x).argmax(axis=1, keepdims=True)}, "call: the network gives int32"),
    ({"call": lambda model, x: model(x).argmax(axis=1, keepdims=True)}, "floating-point outputs, before any argmax"),
    ({"call": lambda model, x: model(x) * jnp.nan}, "its loss on these examples is nan"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_arguments(arguments, message):
    model, x, y = problem("mlp")
    given = {"x": x, "y": y, **arguments}
    with pytest.raises(ValueError, match=message):
        taylor_of(model, **given)


def test_a_hessian_that_is_too_large(digits):
    with pytest.raises(ValueError, match="hessian' of .* parameters; it is for at most 2000"):
        taylor_of(digits[0], digits[1][:5], digits[2][:5], curvature="hessian")


def test_bad_schedules_and_models(digits, models):
    model, task = digits[0], [Task(path="fc", compression=PruneL0(10))]
    for mus, message in (((), "positive"), ((1.0, 0.5), "falls from 1 to 0.5"), ((-1.0,), "positive")):
        with pytest.raises(ValueError, match=message):
            fast_lc(model, task, models["diagonal"], mu_schedule=mus)
    with pytest.raises(ValueError, match="damping: -1"):
        fast_lc(model, task, models["diagonal"], damping=-1.0)
    sunk = models["diagonal"].map(lambda part: type(part)(part.w, part.g, part.h - 1.0))
    with pytest.raises(ValueError, match="mu_schedule: 0.5 at step 1, but the curvature falls to -1"):
        lc(model, task, TaylorLStep(sunk), [0.5])
    # A parameter without a task is not held by the penalty, so its curvature does not matter.
    parts = {path: sunk.parts[path] if path[0] == "conv2" else part for path, part in models["diagonal"].parts.items()}
    elsewhere = dataclasses.replace(sunk, parts=parts)
    assert np.isfinite(lc(model, task, TaylorLStep(elsewhere), [0.5]).history[-1].gap)
    with pytest.raises(ValueError, match="kappa: 10000000"):
        fast_lc(model, [Task(path="fc", compression=PruneL0(10**7))], models["diagonal"])
    small = build(networks.mlp)
    with pytest.raises(ValueError, match="made for a network with other parameters"):
        lc(small, [Task(path="a", compression=PruneL0(10))], TaylorLStep(models["diagonal"]), [1.0])
