"""Deep Compression: what is pruned stays zero, what is shared stays shared, and both learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from solvers.compressions import AdaptiveCodebook, PruneBelow, PruneQuantize
from unified_approx import Recipe, datasets, finetune_compressed, load, musco, pack, save, zoo
from unified_approx.assemble import get
from unified_approx.deep_compression import (
    as_pruned,
    gradual,
    masks_of,
    prune,
    scan,
    share,
    with_codebook_layers,
    with_masks,
)
from unified_approx.evaluate import accuracy
from unified_approx.layers import Factored
from unified_approx.learning_compression.tasks import kernels_of
from unified_approx.narrow import as_dense
from unified_approx.objectives import CrossEntropy, RegularizedCrossEntropy
from unified_approx.pieces import parameters_of, with_values
from unified_approx.sites import path_name

RECIPE = Recipe(epochs=2, batch_size=64, learning_rate=0.02, weight_decay=0.0, augment=None)


@pytest.fixture(scope="module")
def digits():
    """The network, its images for training and for tests."""
    entry, images = zoo.entry("digits"), datasets.load("digits")
    x, y = entry.preprocess(images.x_train, images), np.asarray(images.y_train)
    return zoo.load("digits"), x, y, jnp.asarray(entry.preprocess(images.x_test, images)), images.y_test


@pytest.fixture(scope="module")
def pruned(digits):
    """A tenth of the weights in two steps."""
    model, x, y, *_ = digits
    seen = []
    note = lambda before, after: seen.append((before, after))  # noqa: E731
    return prune(model, x, y, {".*": gradual(0.1, 2)}, recipe=RECIPE, progress=note), seen


def kernels(model):
    return {path: value for path, value in parameters_of(model).items() if path in kernels_of(model)}


def test_the_gradual_schedule():
    assert gradual(0.1, 3) == pytest.approx((0.1 + 0.9 * 8 / 27, 0.1 + 0.9 / 27, 0.1))
    assert gradual(0.2, 1, start=0.5) == (0.2,)


def test_pruning_keeps_so_many_and_training_holds_the_zeros(pruned):
    result, seen = pruned
    assert len(seen) == len(result.history) == 2
    for before, after in seen:
        for left, right in zip(kernels(before.model).values(), kernels(after.model).values(), strict=True):
            np.testing.assert_array_equal(left == 0, right == 0)
            assert not np.array_equal(left, right)
    for value in kernels(result.model).values():
        assert jnp.count_nonzero(value) == round(0.1 * value.size)


def test_retraining_wins_back_what_pruning_lost(digits, pruned):
    *_, x, y = digits
    before, after = pruned[1][-1]
    assert accuracy(after.model, x, y) > accuracy(before.model, x, y)


def test_the_threshold_in_standard_deviations(digits):
    model, x, y, *_ = digits
    result = prune(model, x, y, {".*": PruneBelow(1.0)}, recipe=RECIPE)
    for path, value in kernels(model).items():
        kept = jnp.abs(value) > jnp.std(value)
        np.testing.assert_array_equal(parameters_of(result.model)[path] != 0, kept)


def test_masks_move_from_network_to_network(digits, pruned):
    masks = masks_of(pruned[0].model)
    assert set(masks) == set(kernels(pruned[0].model))
    assert masks_of(digits[0]) == {}
    masked = with_masks(digits[0], masks)
    for path, mask in masks.items():
        np.testing.assert_array_equal(parameters_of(masked)[path], jnp.where(mask, parameters_of(digits[0])[path], 0))
    with pytest.raises(ValueError, match="masks: 'away' is"):
        with_masks(digits[0], {("away",): jnp.ones(3, bool)})


def test_zeros_of_any_origin_are_held(digits):
    model, x, y, *_ = digits
    path = next(iter(kernels(model)))
    masked = with_masks(
        model, {path: jnp.arange(kernels(model)[path].size).reshape(kernels(model)[path].shape) % 3 > 0}
    )
    trained = finetune_compressed(as_pruned(masked), x, y, RECIPE)
    np.testing.assert_array_equal(parameters_of(trained.model)[path] == 0, parameters_of(masked)[path] == 0)


def test_thresholds_of_several_steps(digits):
    model, x, y, *_ = digits
    counts = []
    prune(
        model,
        x[:256],
        y[:256],
        {"conv2": [PruneBelow(0.5), PruneBelow(1.0)]},
        recipe=RECIPE,
        progress=lambda before, after: counts.append(int(jnp.count_nonzero(after.model.conv2.kernel[...]))),
    )
    assert 0 < counts[1] < counts[0] < model.conv2.kernel.size


def test_factors_are_pruned_and_shared_as_kernels_are(digits):
    model, x, *_ = digits
    small = musco(model, x[:64], ranks={"conv2": (8, 8)}, rank_rule=None, rows=256, progress=lambda e: None).model
    values = parameters_of(small)
    factors = [path for path, value in values.items() if path[0] == "conv2" and value.ndim > 1]
    assert len(factors) == 3
    zeros = {path: np.abs(values[path]) > 0.5 * np.std(values[path]) for path in factors}
    sparse = with_masks(small, zeros)
    assert masks_of(sparse).keys() == set(factors)
    held = as_pruned(sparse, "conv2")
    assert {path for piece in held.pieces for path in piece.paths} == set(factors)
    for path, value in parameters_of(share(held, 2, layers="conv2").model).items():
        if path in factors:
            np.testing.assert_array_equal(value != 0, zeros[path])
            assert len(np.unique(value)) <= 5
    penalty = RegularizedCrossEntropy(l1=1.0).observe(lambda m, x: m(x), sparse, jnp.asarray(x[:2]))[1]
    expected = sum(float(jnp.sum(jnp.abs(v))) for v in parameters_of(sparse).values() if v.ndim > 1)
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)


def test_negative_zeros_become_zeros(digits):
    """A mask by multiplication leaves -0.0, which would be packed as a value of its own."""
    kernel = np.asarray(digits[0].conv2.kernel[...])
    negative = np.where(np.abs(kernel) > np.std(kernel), kernel, np.float32(-0.0))
    model = with_values(digits[0], {("conv2", "kernel"): jnp.asarray(negative)})
    for clean in (with_masks(model, masks_of(model)), as_pruned(model, "conv2").model):
        found = np.asarray(clean.conv2.kernel[...])
        np.testing.assert_array_equal(found, negative)
        assert not np.signbit(found[found == 0]).any()


def test_penalties_shrink_weights(digits):
    model, x, y, *_ = digits
    sizes = {}
    for name, objective in {
        "none": None,
        "l1": RegularizedCrossEntropy(l1=1e-2),
        "group": RegularizedCrossEntropy(group=3e-2),
    }.items():
        result = prune(model, x, y, {".*": 0.5}, recipe=RECIPE, objective=objective)
        sizes[name] = sum(float(jnp.sum(jnp.abs(value))) for value in kernels(result.model).values())
    assert sizes["l1"] < 0.9 * sizes["none"]
    assert sizes["group"] < 0.9 * sizes["none"]


def test_the_penalties_are_what_they_say():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.asarray([[3.0, -4.0], [0.0, 0.0], [0.0, 2.0]])
    objective = RegularizedCrossEntropy(l1=0.1, group=0.01)

    def loss(network):
        student = objective.observe(lambda m, x: m(x), network, jnp.ones((4, 3)))
        return objective.loss(student, None, jnp.zeros(4, int))

    plain = CrossEntropy().loss(model(jnp.ones((4, 3))), None, jnp.zeros(4, int))
    np.testing.assert_allclose(loss(model) - plain, 0.1 * 9 + 0.01 * (5 + 2), rtol=1e-6)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(nnx.grad(loss)(model)))


@pytest.fixture(scope="module")
def shared(digits, pruned):
    """Three bits, trained."""
    _, x, y, *_ = digits
    before = share(pruned[0], 3)
    return before, finetune_compressed(before, x, y, RECIPE)


def test_shared_weights_stay_shared_and_zeros_zero(pruned, shared):
    before, after = shared
    changed = False
    for path, value in kernels(after.model).items():
        np.testing.assert_array_equal(value == 0, kernels(pruned[0].model)[path] == 0)
        old = np.asarray(kernels(before.model)[path])
        assert len(np.unique(value)) <= 9
        for one in np.unique(old):
            assert len(np.unique(np.asarray(value)[old == one])) == 1
        changed |= not np.array_equal(old, value)
    assert changed


def test_training_the_values_helps(digits, shared):
    _, x, y, *_ = digits
    before, after = shared
    assert accuracy(after.model, x, y) >= accuracy(before.model, x, y)


def test_bits_by_layer(digits):
    model = digits[0]
    first, *others = [path_name(path[:-1]) for path in kernels_of(model)]
    result = share(model, {first: 2, "|".join(others): 4}, init="density")
    assert [piece.compression for piece in result.pieces] == [
        AdaptiveCodebook(2 ** (2 if piece.name == first else 4), init="density") for piece in result.pieces
    ]


def test_what_is_not_pruned_gets_a_codebook_without_zero(digits, pruned):
    assert all(isinstance(piece.compression, PruneQuantize) for piece in share(pruned[0], 2).pieces)
    assert all(isinstance(piece.compression, AdaptiveCodebook) for piece in share(digits[0], 2).pieces)


def test_codebook_layers_compute_the_same_and_are_saved(digits, shared, tmp_path):
    *_, x, y = digits
    model = with_codebook_layers(shared[1])
    layers = [get(model, path[:-1]) for path in kernels_of(shared[1].model)]
    assert all(isinstance(layer, Factored) and layer.terms[0].kind == "codebook" for layer in layers)
    np.testing.assert_allclose(model(x[:8]), shared[1].model(x[:8]), atol=1e-5)
    for write in (save, pack):
        size = write(tmp_path / "network", model)
        again = load(tmp_path / "network")
        np.testing.assert_array_equal(again(x[:8]), model(x[:8]))
        assert size < save(tmp_path / "dense", as_dense(model))
    assert kernels_of(as_dense(model)) == kernels_of(shared[1].model)


def test_unpruned_codebook_layers_compute_the_same(digits):
    model, *_, x, _y = digits
    result = share(model, 4)
    np.testing.assert_allclose(with_codebook_layers(result)(x[:8]), result.model(x[:8]), atol=1e-5)


def test_packed_networks_are_smaller_stage_by_stage(digits, pruned, shared, tmp_path):
    sizes = [pack(tmp_path / "a", model) for model in (digits[0], pruned[0].model, shared[1].model)]
    assert sizes[0] > 3 * sizes[1] > 3 * 1.3 * sizes[2]


def test_layers_are_scanned_one_by_one(digits):
    model, *_, x, y = digits
    found = scan(model, lambda network: accuracy(network, x, y), [1.0, 0.3, 0.0])
    assert set(found) == {path_name(path[:-1]) for path in kernels_of(model)}
    for line in found.values():
        assert line[0] == accuracy(model, x, y)
        assert line[2] < 40


BAD = [
    (lambda m, x, y: prune(m, x, y, {}), "kept: empty"),
    (lambda m, x, y: prune(m, x, y, {"away": 0.5}), "'away' names no layer"),
    (lambda m, x, y: prune(m, x, y, {".*": 1.5}), "kept: 1.5 of"),
    (lambda m, x, y: prune(m, x, y, {".*": [0.2, 0.3]}), "none larger than the one before"),
    (lambda m, x, y: prune(m, x, y, {".*": PruneBelow(50.0)}), "quality: 50"),
    (lambda m, x, y: gradual(0.5, 0), "steps: 0"),
    (lambda m, x, y: gradual(0.5, 3, start=0.4), "kept, start: 0.5, 0.4"),
    (lambda m, x, y: share(m, 17), "bits: 17"),
    (lambda m, x, y: share(m, {}), "bits: {}"),
    (lambda m, x, y: share(m, 4, init="even"), "init: 'even'"),
    (lambda m, x, y: share(m, {"away": 4}), "'away' names no layer"),
    (lambda m, x, y: scan(m, len, []), r"kept: \[\]"),
    (lambda m, x, y: RegularizedCrossEntropy(l1=-1.0), "l1: -1"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(digits, call, message):
    with pytest.raises(ValueError, match=message):
        call(*digits[:3])


class Grouped(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0))
        self.fc = nnx.Linear(8, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.fc(self.conv(x).mean((1, 2)))


def test_codebook_layers_leave_grouped_convolutions_alone():
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 4)).astype(np.float32)
    result = share(Grouped(), bits=2)
    new = with_codebook_layers(result)
    assert isinstance(new.conv, nnx.Conv)
    assert not isinstance(new.fc, nnx.Linear)
    np.testing.assert_allclose(new(x), result.model(x), atol=1e-5)
