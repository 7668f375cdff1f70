"""The LC algorithm on the digits: it beats direct compression, watches itself, resumes exactly, refuses bad runs."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from solvers.compressions import (
    AdaptiveCodebook,
    Additive,
    Each,
    LowRank,
    OptimalCodebook,
    PenaltyGroups,
    PenaltyNuclear,
    PruneGroups,
    PruneL0,
    RankSelection,
    ScaledBinary,
    ScaledTernary,
    binary,
    powers_of_two,
)
from solvers.prox import CHANNELS
from unified_approx import evaluate, zoo
from unified_approx.learning_compression import (
    LcStoppedError,
    MuSchedule,
    Operations,
    Penalty,
    Schedule,
    SgdLStep,
    Task,
    direct_compression,
    exponential,
    fast,
    informed,
    lc,
    operations,
    run_state,
)
from unified_approx.learning_compression.c_step import c_step, direct
from unified_approx.learning_compression.result import Step
from unified_approx.learning_compression.tasks import resolve
from unified_approx.pieces import parameters_of, with_values

MUS = exponential(1e-2, 1.5, 8)


@pytest.fixture(scope="module")
def l_step(digits):
    return SgdLStep(digits[1], digits[2], Schedule(epochs=2, batch_size=64, learning_rate=0.05))


TASKS = {
    "quantize": [Task(path="conv.|fc", compression=AdaptiveCodebook(4))],
    "prune jointly": [Task(path="conv.|fc", compression=PruneL0(0.05), view="vector", joint=True)],
    "mixed": [
        Task(path="conv2", compression=LowRank(8, "auto")),
        Task(path="conv3", compression=AdaptiveCodebook(2)),
        Task(path="fc", compression=PruneL0(600)),
    ],
    "additive": [Task(path="conv[23]", compression=Additive((AdaptiveCodebook(2), PruneL0(100)), rounds=3))],
    "channels + low rank": [
        Task(path="conv[23]", compression=Additive((PruneGroups(0.2, CHANNELS), LowRank(4)), rounds=5))
    ],
    "column norms + nuclear norm": [
        Task(path="conv[23]", compression=Additive((PenaltyGroups(3e-3), PenaltyNuclear(1e-2)), rounds=5))
    ],
    "one codebook + low rank of each layer": [
        Task(
            path="conv[23]",
            compression=Additive((AdaptiveCodebook(2), Each((LowRank(2, "auto"),))), rounds=3),
            view="vector",
            joint=True,
        )
    ],
    "selected ranks": [Task(path="conv[23]", compression=RankSelection(1e-4, scheme="auto"))],
}


@pytest.mark.parametrize("name", TASKS)
def test_the_network_is_compressed_and_better_than_directly(digits, l_step, name):
    model, _, _, test, labels = digits
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    result = lc(model, TASKS[name], l_step, MUS)
    first, best = result.history[0], result.history[result.best]
    assert best.loss + best.penalty < 0.8 * (first.loss + first.penalty)
    assert best.loss == pytest.approx(l_step.measure(result.model), rel=1e-4)
    assert result.history[-1].gap < max(0.05, 0.5 * result.history[1].gap)
    values = parameters_of(result.model)
    for piece, theta in zip(result.pieces, result.thetas, strict=True):
        np.testing.assert_allclose(piece.pack(values), piece.compression.decompress(theta), atol=1e-6)
    assert evaluate.accuracy(result.model, test, labels) > 90
    jax.tree.map(np.testing.assert_array_equal, weights, nnx.to_pure_dict(nnx.state(model)))
    assert len(result.history[-1].info) == len(result.pieces)


def adam(digits, steps=5, raises_at=None):
    """An L step of a user's own, as the README shows one."""
    x, y = jnp.asarray(digits[1][:200]), digits[2][:200]

    def own(network, penalty, step):
        graphdef, params, rest = nnx.split(network, nnx.Param, ...)
        optimizer = optax.adam(1e-3)

        def loss(params):
            merged = nnx.merge(graphdef, params, rest)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(merged(x), y)) + penalty(merged)

        @jax.jit
        def update(params, state):
            change, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, change), state

        state = optimizer.init(params)
        for i in range(steps):
            params, state = update(params, state)
            if (step, i) == raises_at:
                nnx.update(network, params)
                raise KeyboardInterrupt
        return nnx.merge(graphdef, params, rest)

    return own


def test_quadratic_penalty_and_a_users_own_l_step(digits):
    result = lc(digits[0], TASKS["quantize"], adam(digits), exponential(3e-2, 3.0, 4), augmented=False)
    assert result.best == 4
    assert [line.loss for line in result.history] == [None] * 5
    assert evaluate.accuracy(result.model, digits[3], digits[4]) > 80


def test_the_penalty_is_the_distance_to_the_targets(digits):
    model = digits[0]
    pieces = resolve(TASKS["mixed"], model)
    values = parameters_of(model)
    targets = tuple(piece.pack(values) + 0.1 for piece in pieces)
    penalty = Penalty(jnp.asarray(3.0), targets, pieces)
    assert float(penalty(model)) == pytest.approx(1.5 * 0.01 * sum(piece.size for piece in pieces), rel=1e-4)


def test_multipliers_and_targets_follow_the_formulas(digits):
    """Target Delta + dual/mu; the C step sees w - dual/mu; dual <- dual - mu (w - Delta). Nothing is trained here."""
    seen, compression = [], OptimalCodebook(2)

    def shift(model, penalty, step):
        seen.append((float(penalty.mu), np.asarray(penalty.targets[0], np.float64)))
        return with_values(model, {("fc", "kernel"): parameters_of(model)["fc", "kernel"] * 1.1})

    mus = [1.0, 2.0, 4.0]
    lc(digits[0], [Task(path="fc", compression=compression)], shift, mus)
    w = np.asarray(digits[0].fc.kernel[...], np.float64).T
    delta = lambda aim: np.asarray(compression.decompress(direct(compression, jnp.asarray(aim, jnp.float32))))  # noqa: E731
    theta, dual = delta(w), np.zeros_like(w)
    for mu, (used, target) in zip(mus, seen, strict=True):
        assert used == mu
        np.testing.assert_allclose(target, theta + dual / mu, atol=1e-5)
        w = 1.1 * w
        theta = delta(w - dual / mu)
        dual = dual - mu * (w - theta)


def test_repeated_mu_moves_the_multipliers_once(digits):
    seen = []

    def still(model, penalty, step):
        seen.append(np.asarray(penalty.targets[0]))
        return model

    lc(digits[0], [Task(path="fc", compression=PruneL0(9))], still, exponential(1.0, 1.0 + 1e-9, 2, repeat=3))
    same = [bool(np.allclose(a, b)) for a, b in zip(seen, seen[1:], strict=False)]
    assert same == [True, True, False, False, True]  # with other multipliers theta changes once more


def test_a_resumed_run_ends_with_the_same_weights_after_any_interruption(digits, tmp_path):
    """Killed in an L step that had already written into its network, and again after a step."""
    model, tasks, mus = digits[0], TASKS["additive"], exponential(1e-2, 2.0, 4)
    whole = lc(model, tasks, adam(digits), mus, measure=lambda network: float(network.fc.bias[...].sum()))
    run = {"measure": lambda network: float(network.fc.bias[...].sum()), "checkpoint_dir": tmp_path / "c"}
    with pytest.raises(KeyboardInterrupt):
        lc(model, tasks, adam(digits, raises_at=(2, 3)), mus, **run)

    def killed(line):
        if line.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lc(model, tasks, adam(digits), mus, **run, progress=killed)
    seen = []
    resumed = lc(model, tasks, adam(digits), mus, **run, progress=seen.append)
    assert [line.step for line in seen] == [4]
    assert resumed.best == whole.best
    for a, b in zip(*(jax.tree.leaves((nnx.state(r.model), r.thetas)) for r in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    again = lc(model, tasks, adam(digits), mus, **run)
    assert [line.step for line in again.history] == [0, 1, 2, 3, 4]


def test_our_l_step_resumes_exactly(digits, l_step, tmp_path):
    tasks, mus = [Task(path="fc", compression=AdaptiveCodebook(2))], exponential(1e-2, 2.0, 3)

    def killed(line):
        if line.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lc(digits[0], tasks, l_step, mus, checkpoint_dir=tmp_path / "c", progress=killed)
    resumed = lc(digits[0], tasks, l_step, mus, checkpoint_dir=tmp_path / "c")
    whole = lc(digits[0], tasks, l_step, mus)
    for a, b in zip(*(jax.tree.leaves(nnx.state(r.model)) for r in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_runs_checkpoints_are_refused_and_kept(digits, l_step, tmp_path):
    tasks, mus, folder = [Task(path="fc", compression=PruneL0(9))], exponential(1.0, 2.0, 1), tmp_path / "c"
    still = lambda model, penalty, step: model  # noqa: E731
    lc(digits[0], tasks, still, mus, checkpoint_dir=folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    other = with_values(digits[0], {("fc", "bias"): digits[0].fc.bias[...] + 1})
    for model, asked, schedule, own, more in (
        (digits[0], [Task(path="fc", compression=PruneL0(8))], mus, still, {}),
        (digits[0], [Task(path="conv3", compression=PruneL0(9))], mus, still, {}),
        (digits[0], tasks, exponential(1.0, 2.0, 2), still, {}),
        (digits[0], tasks, mus, still, {"augmented": False}),
        (digits[0], tasks, mus, l_step, {}),
        (other, tasks, mus, still, {}),
    ):
        with pytest.raises(ValueError, match="belongs to another run"):
            lc(model, asked, own, schedule, checkpoint_dir=folder, **more)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_optimizer_and_the_functions_of_a_run_are_known_again(digits):
    """Their numbers as far as they can be seen, and their names; the same in two processes."""

    def identity(**more):
        return SgdLStep(digits[1][:9], digits[2][:9], **more).identity

    def halved(x):
        return x / 2

    def last(model, x):
        return model(x)

    adam = lambda b1: lambda rate: optax.adam(rate, b1=b1)  # noqa: E731
    assert identity() == identity()
    assert identity(optimizer=adam(0.9)) == identity(optimizer=adam(0.9))
    assert json.loads(json.dumps(identity(optimizer=adam(0.9)))) == identity(optimizer=adam(0.9))
    assert "0x" not in json.dumps(identity(optimizer=adam(0.9)))
    others = [identity(), identity(optimizer=adam(0.9)), identity(optimizer=adam(0.8))]
    others += [identity(optimizer=lambda rate: optax.sgd(rate)), identity(prepare=halved), identity(call=last)]
    clipped = lambda most: lambda rate: optax.chain(optax.clip_by_global_norm(most), optax.sgd(rate))  # noqa: E731
    others += [identity(optimizer=clipped(most)) for most in (1.0, 2.0)]
    assert all(a != b for a, b in itertools.combinations(others, 2))


def test_a_run_is_not_resumed_with_another_measure(digits, tmp_path):
    def zero(model):
        return 0.0

    def one(model):
        return 1.0

    run = [Task(path="fc", compression=PruneL0(9))], lambda model, penalty, step: model, [1.0]
    lc(digits[0], *run, measure=zero, checkpoint_dir=tmp_path / "c")
    lc(digits[0], *run, measure=zero, checkpoint_dir=tmp_path / "c")
    with pytest.raises(ValueError, match="its measure differs"):
        lc(digits[0], *run, measure=one, checkpoint_dir=tmp_path / "c")


def test_monitors_speak(digits):
    wild = SgdLStep(digits[1], digits[2], Schedule(epochs=1, batch_size=64, learning_rate=0.8, momentum=0.0))
    result = lc(digits[0], TASKS["quantize"], wild, [1e-3])
    assert any("the L step raised" in note for note in result.history[1].warnings)
    assert result.warnings[0].startswith("step 1: the L step raised")


def test_a_c_step_that_gets_worse_is_reported(digits, monkeypatch):
    best = PruneL0.compress
    worse = lambda self, target, mu, start=None: best(self, target, mu) if start is None else 0.5 * start  # noqa: E731
    monkeypatch.setattr(PruneL0, "compress", worse)
    still = lambda model, penalty, step: model  # noqa: E731
    result = lc(digits[0], [Task(path="fc", compression=PruneL0(777))], still, [1.0])
    assert any("the C step raised" in note for note in result.history[1].warnings)


def test_an_l_step_that_diverges_is_stopped_and_the_best_kept(digits, tmp_path):
    tasks = [Task(path="fc", compression=PruneL0(99))]

    def breaks(model, penalty, step):
        return with_values(model, {("fc", "bias"): jnp.full(10, jnp.nan)}) if step == 2 else model

    with pytest.raises(LcStoppedError, match=r"step 3 .mu=3.: there are weights that are not finite") as caught:
        lc(digits[0], tasks, breaks, [1.0, 2.0, 3.0], checkpoint_dir=tmp_path / "c")
    kept = caught.value.result
    assert (kept.best, len(kept.history)) == (2, 3)
    assert np.isfinite(evaluate.predict(kept.model, digits[3][:2])).all()
    wild = SgdLStep(digits[1], digits[2], Schedule(epochs=2, batch_size=64, learning_rate=1e6, momentum=0.0))
    with pytest.raises(LcStoppedError, match=r"step 1 .mu=1e-08.: the loss is (nan|inf) in batch \d+ of epoch 1"):
        lc(digits[0], tasks, wild, [1e-8])


def test_c_steps_compile_once_for_each_compression_and_shape():
    class Three(nnx.Module):
        def __init__(self):
            for name in ("a", "b"):
                setattr(self, name, nnx.Linear(7, 5, rngs=nnx.Rngs(0)))
            self.c = nnx.Linear(7, 4, rngs=nnx.Rngs(0))

    c_step.clear_cache(), direct.clear_cache()
    still = lambda model, penalty, step: model  # noqa: E731
    lc(Three(), [Task(path="[abc]", compression=PruneL0(3))], still, exponential(1.0, 1.3, 5))
    assert (c_step._cache_size(), direct._cache_size()) == (2, 2)


class Normed(nnx.Module):
    """Two layers, each followed by a batch norm."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.one, self.two = (nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.Conv(4, 4, (3, 3), rngs=rngs))
        self.bn1, self.bn2 = (nnx.BatchNorm(4, rngs=rngs) for _ in range(2))
        self.fc = nnx.Linear(4, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn2(self.two(nnx.relu(self.bn1(self.one(x))))))
        return self.fc(x.mean(axis=(1, 2)))


def test_a_rank_0_layer_before_a_batch_norm_is_let_go(digits):
    """It leaves penalty and multipliers; where nothing else is compressed there is no L step."""
    model, seen = Normed(), []
    model.eval()

    def shrinks(network, penalty, step):
        seen.append([piece.name for piece in penalty.pieces])
        return network

    tasks = [Task(path="one|fc", compression=PruneL0(3)), Task(path="two", compression=LowRank(0))]
    known = informed(tasks, model, jnp.zeros((2, 8, 8, 1)))
    assert [task.norm_after for task in known] == [False, True, True]
    lc(model, known, shrinks, [1.0, 2.0])
    assert seen == [["fc", "one"]] * 2
    seen.clear()
    result = lc(model, known[2:], shrinks, [1.0, 2.0])
    assert not seen
    assert float(jnp.abs(result.model.two.kernel[...]).max()) == 0


def test_the_running_statistics_are_those_of_the_best_step():
    model = Normed()
    model.eval()
    losses = iter([5.0, 5.0, 1.0, 1.0, 3.0, 3.0])

    def counts(network, penalty, step):
        network.bn1.mean[...] = jnp.full(4, float(step + 1))
        return network

    result = lc(
        model, [Task(path="fc", compression=PruneL0(3))], counts, [1.0, 2.0], measure=lambda network: next(losses)
    )
    assert result.best == 1
    np.testing.assert_array_equal(result.model.bn1.mean[...], 1.0)
    np.testing.assert_array_equal(model.bn1.mean[...], 0.0)


def test_ranks_are_priced_by_the_layers_use():
    model = zoo.create("resnet20")
    tasks = [Task(path="blocks/3/conv[12]|fc", compression=RankSelection(2.0, "macs", "auto"))]
    strided, plain, dense = (task.compression for task in informed(tasks, model, jnp.zeros((2, 32, 32, 3))))
    assert [part.cost for part in strided.parts] == [(256.0, 256.0), (256.0, 512.0)]  # 16x16 out of 32x32
    assert [part.cost for part in plain.parts] == [(256.0, 256.0)] * 2
    assert dense.cost == (1.0, 1.0)
    assert dense.alpha == 2.0
    scaled = informed(tasks[:1], model, jnp.zeros((2, 32, 32, 3)), normalize=True)[2].compression
    assert scaled.alpha == pytest.approx(2 * float(jnp.sum(model.fc.kernel[...] ** 2)), rel=1e-5)


def test_a_layer_pattern_means_kernels_and_order_is_the_networks(digits):
    """An additive task beside others, and every layer of VGG-16: LC-model-compression gets both wrong."""
    pieces = resolve([*TASKS["additive"], Task(path="fc", compression=PruneL0(1))], digits[0])
    assert [piece.name for piece in pieces] == ["conv2", "conv3", "fc"]
    kernels = resolve([Task(path="convs/.*|fc", compression=PruneL0(1))], zoo.create("vgg16"))
    assert [piece.layers[0].c_out for piece in kernels] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 + [10]
    biases = resolve([Task(path="conv./bias", compression=PruneL0(1))], digits[0])
    assert [piece.paths for piece in biases] == [(("conv1", "bias"),), (("conv2", "bias"),), (("conv3", "bias"),)]


def test_packing_is_undone(digits):
    model = digits[0]
    values = parameters_of(model)
    for tasks in TASKS.values():
        for piece in resolve(tasks, model):
            for path, value in piece.unpack(piece.pack(values)).items():
                np.testing.assert_array_equal(value, values[path])
    changed = with_values(model, {("fc", "kernel"): values["fc", "kernel"] * 2})
    np.testing.assert_array_equal(changed.fc.kernel[...], 2 * model.fc.kernel[...])


def test_the_factors_of_a_factored_network(digits):
    """The chain of the poster: low rank, then its factors at 1 bit + pruning."""
    # Products of factors are steeper than the layers were: at the rate of the other tests all units may die.
    l_step = SgdLStep(digits[1], digits[2], Schedule(epochs=2, batch_size=64, learning_rate=0.02))
    low = lc(digits[0], [Task(path="conv[23]", compression=LowRank(8))], l_step, MUS[:3]).rebuilt()
    form = Additive((AdaptiveCodebook(2), PruneL0(0.05)), rounds=3)
    tasks = [Task(path="conv[23]/terms/0/(u|first/values)", compression=form)]
    result = lc(low, tasks, l_step, MUS)
    assert len(result.pieces) == 4
    assert result.history[result.best].loss < 0.5 * result.history[0].loss
    assert evaluate.accuracy(result.model, digits[3], digits[4]) > 90


BAD = [
    ([], MUS, "tasks: empty"),
    ([Task(path="dense", compression=PruneL0(1))], MUS, "'dense' names no layer and no parameter; there are: conv1"),
    ([*TASKS["quantize"], Task(path="fc", compression=PruneL0(1))], MUS, "'fc/kernel' is named by"),
    ([Task(path="fc", compression=PruneL0(10**7))], MUS, "tasks: fc: kappa: 10000000"),
    ([Task(path="fc", compression=LowRank(11))], MUS, "tasks: fc: rank: 11"),
    ([Task(path="fc", compression=RankSelection(1.0, "macs"))], MUS, "depends on the images"),
    ([Task(path="fc", compression=AdaptiveCodebook(10**6))], MUS, "tasks: fc: k: 1000000 values for 10240 weights"),
    ([Task(path="conv2", view="vector", compression=LowRank(1))], MUS, "low rank needs one matrix"),
    (TASKS["quantize"], [], "mu_schedule"),
    (TASKS["quantize"], [1.0, 0.5], "falls from 1 to 0.5"),
    (TASKS["quantize"], [0.0], "positive"),
    (TASKS["quantize"], [1.0, float("nan")], "positive"),
]


@pytest.mark.parametrize(("tasks", "mus", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_runs(digits, l_step, tasks, mus, message):
    with pytest.raises(ValueError, match=message):
        lc(digits[0], tasks, l_step, mus)


def test_more_values_than_distinct_weights(digits):
    few = with_values(digits[0], {("fc", "kernel"): jnp.sign(digits[0].fc.kernel[...])})
    with pytest.raises(ValueError, match="k: 3 values for weights of which 2 are distinct"):
        lc(few, [Task(path="fc", compression=AdaptiveCodebook(3))], lambda *_: few, [1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: Task(path="(", compression=PruneL0(1)), "not a regular"),
        (lambda d: Task(path="a", compression=PruneL0(1), view="row"), "view='row'"),
        (lambda d: Task(path="a", compression=PruneL0(1), joint=True), "joint"),
        (lambda d: Schedule(epochs=0), "epochs: 0"),
        (lambda d: Schedule(first_epochs=-1), "first_epochs: -1"),
        (lambda d: Schedule(learning_rate=0.0), "learning_rate: 0.0"),
        (lambda d: Schedule(momentum=1.0), "momentum: 1.0"),
        (lambda d: SgdLStep(d[1], d[2][:5]), "y: int32 .5,.; give an integer for each of 1297"),
        (lambda d: SgdLStep(d[1], d[2], measured=0), "measured: 0"),
        (lambda d: SgdLStep(d[1], d[2], augment="flip"), "augment: 'flip'"),
        (lambda d: exponential(1.0, 0.9, 3), "factor >= 1"),
        (lambda d: MuSchedule((1.0,), 0), "repeat: 0"),
        (lambda d: lc(d[0], TASKS["additive"], lambda *_: None, [1.0]), "l_step: it returned a NoneType"),
    ],
)
def test_bad_arguments(digits, make, message):
    with pytest.raises(ValueError, match=message):
        make(digits)


def test_a_step_without_a_finite_loss_is_never_the_best():
    lines = [Step(step=i, mu=0.1, loss=loss, gap=0.0) for i, loss in enumerate([np.nan, 2.0, np.inf, 1.0])]
    assert [run_state._best_step(lines[: i + 1]) for i in range(4)] == [0, 1, 1, 3]


def test_a_codebook_multiplies_once_a_value_and_output():
    model, x = zoo.create("lenet300"), np.zeros((2, 28, 28, 1), np.float32)
    tasks = [Task(path="fc1", compression=AdaptiveCodebook(2)), Task(path="fc2", compression=LowRank(5))]
    found = operations(direct_compression(model, tasks), x)
    assert found["fc1"] == Operations(2 * 300, 784 * 300)
    assert found["fc2"] == Operations(300 * 100, 300 * 100)  # the merged form
    assert found["fc3"] == Operations(1000, 1000)


def test_signs_and_given_values_multiply_as_often_as_they_must():
    model, x = zoo.create("lenet300"), np.zeros((2, 28, 28, 1), np.float32)
    forms = {"fc1": ScaledBinary(), "fc2": ScaledTernary(), "fc3": binary()}
    result = direct_compression(model, [Task(path=path, compression=form) for path, form in forms.items()])
    found = operations(result, x)
    kept = int(jnp.count_nonzero(result.model.fc2.kernel[...]))
    assert found == {
        "fc1": Operations(300, 784 * 300),
        "fc2": Operations(100, kept),
        "fc3": Operations(0, 1000),
    }
    tasks = [Task(path="fc2", compression=powers_of_two(0, -3)), Task(path="fc3", compression=OptimalCodebook(2))]
    found = operations(direct_compression(model, tasks), x)
    assert found["fc2"].multiplications == 3 * 100  # 1/2, 1/4, 1/8 with either sign
    assert found["fc3"] == Operations(20, 1000)


def test_a_sum_with_a_codebook_adds_up_its_parts():
    model, x = zoo.create("lenet300"), np.zeros((2, 28, 28, 1), np.float32)
    tasks = [
        Task(path="fc1", compression=Additive((AdaptiveCodebook(2), PruneL0(50)))),
        Task(path="fc2", compression=Additive((AdaptiveCodebook(2), LowRank(3)))),
    ]
    found = operations(direct_compression(model, tasks), x)
    assert found["fc1"] == Operations(2 * 300 + 50, 784 * 300 + 50)
    assert found["fc2"] == Operations(2 * 100 + 3 * 400, 300 * 100 + 3 * 400)
    joint = Additive((AdaptiveCodebook(2), PruneL0(60)))
    result = direct_compression(model, [Task(path="fc.", compression=joint, view="vector", joint=True)])
    found = operations(result, x)
    pruned = joint.parts[1].decompress(result.thetas[0][1])
    ends = np.cumsum([784 * 300, 300 * 100])
    for path, part, outputs in zip(
        ("fc1", "fc2", "fc3"), np.split(np.asarray(pruned), ends), (300, 100, 10), strict=True
    ):
        own = int(np.count_nonzero(part))
        assert found[path] == Operations(2 * outputs + own, part.size + own)


def test_direct_compression_is_one_c_step(digits, monkeypatch):
    """Where the C step is the answer: nothing is alternated."""
    monkeypatch.setattr(fast, "alternate", None)
    for form in (LowRank(3), PenaltyNuclear(0.5), RankSelection(1e-3), Additive((LowRank(2), PruneL0(9)))):
        result = direct_compression(digits[0], [Task(path="fc", compression=form)])
        w = digits[0].fc.kernel[...].T
        expected = form.decompress(form.compress(w, 1.0))
        np.testing.assert_allclose(result.model.fc.kernel[...].T, expected, atol=1e-5)
        gap = float(jnp.sum((w - expected) ** 2))
        assert result.history[0].loss == pytest.approx(gap / 2, rel=1e-4)
