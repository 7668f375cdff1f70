"""Training and fine-tuning on the digits: it learns, keeps the structure, resumes exactly."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import unified_approx as ua
from unified_approx import datasets, evaluate, zoo
from unified_approx.cost import network_cost
from unified_approx.finetuning import finetune
from unified_approx.loop import augment_crop_flip
from unified_approx.norms import fold_batch_norms, insert_batch_norms
from unified_approx.training import Recipe, train

RECIPE = Recipe(epochs=2, batch_size=64, augment=None, learning_rate=0.02)


@pytest.fixture(scope="module")
def digits():
    entry, data = zoo.entry("digits"), datasets.load("digits")
    x, test = (entry.preprocess(images) for images in (data.x_train, data.x_test))
    return x, np.asarray(data.y_train), test, np.asarray(data.y_test)


@pytest.fixture(scope="module")
def small(digits):
    budget = ua.Budget(params=0.2)
    arguments = {"form": "columns", "allocation": "uniform", "rows": 1024, "progress": lambda e: None}
    return ua.compress(zoo.load("digits"), digits[0][:200], budget=budget, **arguments)


def test_finetuning_gains_and_keeps_the_structure(digits, small):
    x, y, test, labels = digits
    before = evaluate.accuracy(small.model, test, labels)
    lines = []
    done = finetune(small, x, y, RECIPE, original=zoo.load("digits"), progress=lines.append)
    assert evaluate.accuracy(done.model, test, labels) > before
    assert [line.epoch for line in lines] == [1, 2]
    assert lines[1].loss < lines[0].loss
    for old, new in zip(jax.tree.leaves(nnx.state(small.model)), jax.tree.leaves(nnx.state(done.model)), strict=True):
        assert old.shape == new.shape
        if jnp.issubdtype(old.dtype, jnp.integer):
            np.testing.assert_array_equal(old, new)


def test_batch_norms_put_back_train_and_fold_to_the_same_structure(digits):
    x, y, test, labels = digits
    model = train(zoo.create("digits", batch_norm=True), x, y, RECIPE).model
    arguments = {"allocation": "uniform", "rows": 1024, "progress": lambda e: None}
    small = ua.compress(model, x[:200], budget=ua.Budget(params=0.15), form="low_rank", **arguments).model
    with_norms, paths = insert_batch_norms(small, x[:256])
    assert paths == (("bn1",), ("bn2",), ("bn3",))
    assert all(isinstance(getattr(with_norms, *path), nnx.BatchNorm) for path in paths)
    np.testing.assert_allclose(evaluate.predict(with_norms, test), evaluate.predict(small, test), atol=1e-3)
    folded = fold_batch_norms(with_norms, paths, x[:256])
    np.testing.assert_allclose(evaluate.predict(folded, test), evaluate.predict(small, test), atol=1e-3)
    done = finetune(small, x, y, RECIPE, batch_norms=True)
    assert evaluate.accuracy(done.model, test, labels) > evaluate.accuracy(small, test, labels)
    for network in (folded, done.model):
        assert network_cost(network, x[:2]) == network_cost(small, x[:2])
    last = small.conv3  # where nothing is left of a layer, there is no norm to put back
    empty = nnx.clone(small)
    empty.conv3 = type(last).from_terms([], np.asarray(last.bias[...]), last.geometry)
    with_norms, paths = insert_batch_norms(empty, x[:256])
    assert paths == (("bn1",), ("bn2",))
    np.testing.assert_allclose(evaluate.predict(with_norms, test), evaluate.predict(empty, test), atol=1e-3)
    assert network_cost(finetune(empty, x, y, RECIPE, batch_norms=True).model, x[:2]) == network_cost(empty, x[:2])


def test_training_from_scratch_learns(digits):
    x, y, test, labels = digits
    model = zoo.load("digits")
    nnx.update(model, jax.tree.map(lambda a: a * 0.5, nnx.state(model, nnx.Param)))
    done = train(model, x, y, RECIPE)
    assert evaluate.accuracy(done.model, test, labels) > 95


def test_batch_norms_statistics_follow_the_data(digits):
    x, y, test, labels = digits
    model = zoo.create("digits", batch_norm=True)
    before = [np.asarray(norm.mean.get_value()) for norm in (model.bn1, model.bn2, model.bn3)]
    done = train(model, x, y, RECIPE)
    after = [np.asarray(norm.mean.get_value()) for norm in (done.model.bn1, done.model.bn2, done.model.bn3)]
    assert all(np.abs(new - old).max() > 1e-3 for new, old in zip(after, before, strict=True))
    assert evaluate.accuracy(done.model, test, labels) > 90
    for norm, old in zip((model.bn1, model.bn2, model.bn3), before, strict=True):
        np.testing.assert_array_equal(norm.mean.get_value(), old)


def test_best_epoch_on_validation_and_patience(digits, small):
    x, y, test, labels = digits
    rates = lambda step: jnp.where(step < 2 * (len(x) // 128), 0.02, 3.0)  # noqa: E731 - harmful from epoch 3 on
    arguments = {"validation": (test, labels), "patience": 1, "optimizer": optax.sgd(rates)}
    done = finetune(small, x, y, Recipe(epochs=6, augment=None), **arguments)
    accuracies = [line.accuracy for line in done.history]
    assert len(done.history) < 6
    assert done.best == int(np.argmax(accuracies)) + 1
    assert evaluate.accuracy(done.model, test, labels) == pytest.approx(max(accuracies))


def test_the_network_that_was_given_is_returned_where_training_only_harms_it(digits, tmp_path):
    x, y, test, labels = digits
    network = zoo.load("digits")
    arguments = {"validation": (test, labels), "optimizer": optax.sgd(1.0), "checkpoint_dir": tmp_path / "c"}
    for _ in range(2):  # the second time from the checkpoint
        done = train(network, x[:256], y[:256], Recipe(epochs=2, augment=None), **arguments)
        assert (done.best, len(done.history)) == (0, 2)
        assert max(line.accuracy for line in done.history) < evaluate.accuracy(network, test, labels)
        for old, new in zip(*(jax.tree.leaves(nnx.state(m)) for m in (network, done.model)), strict=True):
            np.testing.assert_array_equal(old, new)


KILLED = """
import os, sys
from unified_approx import datasets, zoo
from unified_approx.training import Recipe, train
entry, data = zoo.entry("digits"), datasets.load("digits")
def die(line):
    if line.epoch == 2:
        os._exit(9)
train(zoo.load("digits"), entry.preprocess(data.x_train[:500]), data.y_train[:500],
      Recipe(epochs=4, batch_size=64, learning_rate=0.02), checkpoint_dir=sys.argv[1], progress=die)
"""


def test_a_killed_run_resumes_and_ends_with_the_same_weights(digits, tmp_path):
    x, y = (array[:500] for array in digits[:2])
    recipe = Recipe(epochs=4, batch_size=64, learning_rate=0.02)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "c")], check=False)
    assert killed.returncode == 9
    lines = []
    resumed = train(zoo.load("digits"), x, y, recipe, checkpoint_dir=tmp_path / "c", progress=lines.append)
    assert [line.epoch for line in lines] == [3, 4]
    whole = train(zoo.load("digits"), x, y, recipe)
    for a, b in zip(jax.tree.leaves(nnx.state(whole.model)), jax.tree.leaves(nnx.state(resumed.model)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="its recipe differs"):
        train(zoo.load("digits"), x, y, RECIPE, checkpoint_dir=tmp_path / "c")
    other = zoo.load("digits")
    other.conv2.kernel[...] = 1.1 * other.conv2.kernel[...]
    for network, change, differs in (
        (zoo.create("lenet300"), {}, "network"),
        (other, {}, "weights"),
        (zoo.load("digits"), {"teacher": other}, "weights"),
        (zoo.load("digits"), {"optimizer": optax.adam(1e-3)}, "optimizer"),
    ):
        with pytest.raises(ValueError, match=f"its {differs} differ"):
            train(network, x, y, recipe, checkpoint_dir=tmp_path / "c", **change)
    with pytest.raises(ValueError, match="its data differs"):
        train(zoo.load("digits"), x[::-1], y, recipe, checkpoint_dir=tmp_path / "c")


def test_a_run_that_diverges_ends_with_the_last_sound_network(digits, tmp_path):
    x, y = (array[:256] for array in digits[:2])
    recipe = Recipe(epochs=3, batch_size=64, augment=None, clip=np.inf)
    rates = lambda step: jnp.where(step < 4, 1e-3, 1e9)  # noqa: E731 - sound in the first epoch, not after
    for _ in range(2):  # the second time from the checkpoint: it stays ended
        with pytest.warns(UserWarning, match="diverged in epoch [23]; the network is that of epoch"):
            done = train(zoo.load("digits"), x, y, recipe, optimizer=optax.sgd(rates), checkpoint_dir=tmp_path / "c")
        assert np.isfinite(done.history[done.best - 1].loss)
        assert not np.isfinite(done.history[-1].loss)
        assert np.isfinite(evaluate.predict(done.model, x[:8])).all()


def test_decay_of_products_is_that_of_the_layers_matrix(digits):
    """One step of plain SGD on a network that learns nothing: the change is that of weight_decay/2 ||u v||^2."""
    x, y = (array[:64] for array in digits[:2])
    arguments = {"allocation": "uniform", "rows": 1024, "form": "low_rank", "progress": lambda e: None}
    low = ua.compress(zoo.load("digits"), x, budget=ua.Budget(params=0.2), **arguments).model
    changes = []
    for decay in (0.0, 0.1):
        recipe = Recipe(
            epochs=1, batch_size=64, augment=None, momentum=0.0, clip=np.inf, weight_decay=decay, decay_products=True
        )
        changes.append(train(low, x, y, recipe).model)
    for name in ("conv2", "conv3"):
        gradient = nnx.grad(lambda layer: 0.05 * jnp.sum(layer.kernel() ** 2))(getattr(low, name))
        change = 0.05 / 25 * gradient["terms"][0]["u"][...]  # at the first rate of the schedule
        without, decayed = (getattr(network, name).terms[0].u[...] for network in changes)
        np.testing.assert_allclose(without - decayed, change, atol=2e-7, rtol=1e-3)
        assert np.abs(change).max() > 1e-5


def test_augmentation_moves_and_mirrors_but_keeps_the_pixels():
    images = jnp.arange(2 * 8 * 8 * 1, dtype=jnp.float32).reshape(2, 8, 8, 1) + 1
    many = jnp.repeat(images[:1], 200, axis=0)
    out = np.asarray(augment_crop_flip(many, jax.random.key(0)))
    assert out.shape == many.shape
    assert set(np.unique(out)) <= {0.0, *np.unique(images[0])}
    assert 0.3 < np.mean([np.array_equal(i[:, ::-1], np.sort(i[:, ::-1], axis=1)) for i in out[..., 0]]) < 0.9


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": 0}, {"distill": 1.5}, {"warmup": -0.1}, {"temperature": 0.0}]
)
def test_bad_recipes(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Recipe(**change)


def test_bad_arguments(digits, small):
    x, y, _, _ = digits
    with pytest.raises(ValueError, match="one integer label for each"):
        finetune(small, x, y[:-1], RECIPE)
    with pytest.raises(ValueError, match="y: .* one integer label"):
        train(small.model, x, recipe=RECIPE)
    with pytest.raises(ValueError, match="validation"):
        finetune(small, x, y, RECIPE, patience=2)
