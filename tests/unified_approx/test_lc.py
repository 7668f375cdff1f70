"""The LC algorithm on the digits: it beats direct compression, watches itself, resumes exactly, refuses bad tasks."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import unified_approx as ua
from solvers.compressions import AdaptiveCodebook, Additive, LowRank, PruneL0, RankSelection
from unified_approx import datasets, evaluate, zoo
from unified_approx.learning_compression import Penalty, Schedule, SgdLStep, Task, lc
from unified_approx.learning_compression.tasks import parameters_of, resolve, with_values

SCHEDULE = Schedule(epochs=2, batch_size=64, learning_rate=0.02)
MUS = [1e-3 * 2.0**i for i in range(8)]


@pytest.fixture(scope="module")
def digits():
    entry, data = zoo.entry("digits"), datasets.load("digits")
    x, test = (entry.preprocess(images) for images in (data.x_train, data.x_test))
    return zoo.load("digits"), x, np.asarray(data.y_train), test, data.y_test


@pytest.fixture(scope="module")
def l_step(digits):
    return SgdLStep(digits[1], digits[2], SCHEDULE)


TASKS = {
    "quantize": [Task(path="conv.|fc", compression=AdaptiveCodebook(2))],
    "prune jointly": [Task(path="conv.|fc", compression=PruneL0(1000), view="vector", joint=True)],
    "mixed": [
        Task(path="conv2", compression=LowRank(4)),
        Task(path="conv3", compression=AdaptiveCodebook(2)),
        Task(path="fc", compression=PruneL0(300)),
    ],
    "additive": [Task(path="conv[23]", compression=Additive((AdaptiveCodebook(2), PruneL0(100)), rounds=3))],
    "selected ranks": [Task(path="conv[23]", compression=RankSelection(1e-5))],
}


@pytest.mark.parametrize("name", TASKS)
def test_the_network_is_compressed_and_better_than_directly(digits, l_step, name):
    model, _, _, test, labels = digits
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    result = lc(model, TASKS[name], l_step, MUS)
    first, best = result.history[0], result.history[result.best]
    assert best.loss < 0.8 * first.loss or first.loss < 1e-3
    assert best.loss == pytest.approx(l_step.measure(result.model), rel=1e-4)
    assert result.history[-1].gap < max(0.05, 0.5 * first.gap)
    assert result.cr > 1.5
    values = parameters_of(result.model)
    for piece, theta in zip(result.pieces, result.thetas, strict=True):
        np.testing.assert_allclose(piece.pack(values), piece.compression.decompress(theta), atol=1e-6)
    assert evaluate.accuracy(result.model, test, labels) > 90
    jax.tree.map(np.testing.assert_array_equal, weights, nnx.to_pure_dict(nnx.state(model)))


def test_quadratic_penalty_and_a_users_own_l_step(digits):
    model, x, y, test, labels = digits
    x = jnp.asarray(x)

    def own(network, penalty, step):
        graphdef, params, rest = nnx.split(network, nnx.Param, ...)
        optimizer = optax.adam(1e-3)

        def loss(params):
            merged = nnx.merge(graphdef, params, rest)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(merged(x), y)) + penalty(merged)

        @jax.jit
        def update(carry, _):
            params, state = carry
            change, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, change), state), None

        (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), length=5)
        return nnx.merge(graphdef, params, rest)

    result = lc(model, TASKS["quantize"], own, MUS[::2], augmented=False)
    assert result.best == 4
    assert [line.loss for line in result.history] == [None] * 5
    assert evaluate.accuracy(result.model, test, labels) > 80


def test_the_penalty_is_the_distance_to_the_targets(digits):
    model = digits[0]
    pieces = resolve(TASKS["mixed"], model)
    values = parameters_of(model)
    targets = tuple(piece.pack(values) + 0.1 for piece in pieces)
    penalty = Penalty(jnp.asarray(3.0), targets, pieces)
    assert float(penalty(model)) == pytest.approx(1.5 * 0.01 * sum(piece.size for piece in pieces), rel=1e-4)


def test_packing_is_undone(digits):
    model = digits[0]
    values = parameters_of(model)
    for tasks in TASKS.values():
        for piece in resolve(tasks, model):
            for path, value in piece.unpack(piece.pack(values)).items():
                np.testing.assert_array_equal(value, values[path])
    changed = with_values(model, {("fc", "kernel"): values["fc", "kernel"] * 2})
    np.testing.assert_array_equal(changed.fc.kernel[...], 2 * model.fc.kernel[...])


def test_the_factors_of_a_factored_network(digits, l_step):
    """The chain of the poster: low rank, then its factors quantized."""
    arguments = {"form": "low_rank", "allocation": "uniform", "rows": 1024, "progress": lambda e: None}
    small = ua.compress(digits[0], digits[1][:200], budget=ua.Budget(params=0.4), **arguments)
    tasks = [Task(path="conv[23]/terms/0/.*(u|values)", compression=AdaptiveCodebook(4), view="vector")]
    result = lc(small.model, tasks, l_step, MUS[:4])
    assert len(result.pieces) == 4
    assert result.history[result.best].loss <= result.history[0].loss
    for piece in result.pieces:
        assert len(np.unique(np.asarray(piece.pack(parameters_of(result.model))))) <= 4


KILLED = """
import os, sys
from unified_approx import datasets, zoo
from unified_approx.learning_compression import Schedule, SgdLStep, Task, lc
from solvers.compressions import AdaptiveCodebook
entry, data = zoo.entry("digits"), datasets.load("digits")
class Dies(SgdLStep):
    def __call__(self, model, penalty, step):
        new = super().__call__(model, penalty, step)
        if step == 2:
            os._exit(9)
        return new
step = Dies(entry.preprocess(data.x_train), data.y_train, Schedule(epochs=2, batch_size=64, learning_rate=0.02))
tasks = [Task(path="conv.|fc", compression=AdaptiveCodebook(2))]
lc(zoo.load("digits"), tasks, step, [1e-3 * 2.0**i for i in range(4)], checkpoint_dir=sys.argv[1])
"""


def test_a_run_killed_in_an_l_step_ends_with_the_same_weights(digits, l_step, tmp_path):
    model, folder = digits[0], tmp_path / "c"
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False).returncode == 9
    seen = []
    resumed = lc(model, TASKS["quantize"], l_step, MUS[:4], checkpoint_dir=folder, progress=seen.append)
    assert [line.step for line in seen] == [3, 4]
    whole = lc(model, TASKS["quantize"], l_step, MUS[:4])
    for a, b in zip(*(jax.tree.leaves(nnx.state(r.model)) for r in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="belongs to another run"):
        lc(model, TASKS["mixed"], l_step, MUS[:4], checkpoint_dir=folder)


def test_monitors_speak(digits):
    wild = SgdLStep(digits[1], digits[2], Schedule(epochs=1, batch_size=64, learning_rate=0.8, momentum=0.0))
    result = lc(digits[0], TASKS["quantize"], wild, [1e-3])
    assert any("the L step raised" in note for note in result.history[1].warnings)


def test_an_l_step_that_diverges_is_stopped(digits):
    broken = lambda model, penalty, step: with_values(model, {("fc", "bias"): jnp.full(10, jnp.nan)})  # noqa: E731
    with pytest.raises(FloatingPointError, match="step 1 .mu=0.001. gave"):
        lc(digits[0], TASKS["quantize"], broken, [1e-3])


BAD = [
    ([], MUS, "tasks: empty"),
    ([Task(path="dense", compression=PruneL0(1))], MUS, "'dense' names no parameter; there are: conv1"),
    ([*TASKS["quantize"], Task(path="fc", compression=PruneL0(1))], MUS, "'fc/kernel' is named by"),
    ([Task(path="fc", compression=PruneL0(10**7))], MUS, "kappa: 10000000"),
    (TASKS["quantize"], [], "mu_schedule"),
    (TASKS["quantize"], [1.0, 0.5], "falls from 1 to 0.5"),
    (TASKS["quantize"], [0.0], "positive"),
]


@pytest.mark.parametrize(("tasks", "mus", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_runs(digits, l_step, tasks, mus, message):
    with pytest.raises(ValueError, match=message):
        lc(digits[0], tasks, l_step, mus)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "("}, "not a regular"),
        ({"path": "a", "view": "row"}, "view='row'"),
        ({"path": "a", "joint": True}, "joint"),
    ],
)
def test_bad_tasks(arguments, message):
    with pytest.raises(ValueError, match=message):
        Task(compression=PruneL0(1), **arguments)
