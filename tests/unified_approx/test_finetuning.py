"""Matching the original's outputs on the digits: agreement improves without labels, the structure stays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import build, nested

import unified_approx as ua
from unified_approx import datasets, evaluate, zoo
from unified_approx.calling import forward
from unified_approx.finetuning import MATCH_RECIPE
from unified_approx.macs import factored_layers
from unified_approx.objectives import OutputMatch

RECIPE = ua.Recipe(epochs=3, batch_size=64, augment=None, learning_rate=0.02, weight_decay=0.0)
QUIET = {"form": "columns", "allocation": "uniform", "rows": 1024, "progress": lambda e: None}


@pytest.fixture(scope="module")
def digits():
    entry, data = zoo.entry("digits"), datasets.load("digits")
    return zoo.load("digits"), entry.preprocess(data.x_train), entry.preprocess(data.x_test)


@pytest.fixture(scope="module")
def small(digits):
    return ua.compress(digits[0], digits[1][:200], budget=ua.Budget(params=0.1), **QUIET)


@pytest.fixture(scope="module")
def whole(digits):
    """Low rank reads every channel, so that none is removed."""
    return ua.compress(digits[0], digits[1][:200], budget=ua.Budget(params=0.1), **{**QUIET, "form": "low_rank"})


def executions(network):
    return {path: layer.execution for path, layer in factored_layers(network).items()}


def block_error(original, network, x, name):
    """Relative squared error of one block's output."""
    match = OutputMatch(blocks=((name,),))
    network, original = nnx.clone(network), nnx.clone(original)
    network.eval()
    original.eval()
    return float(match.loss(*(match.observe(forward, each, jnp.asarray(x)) for each in (network, original))))


def test_matching_improves_agreement_and_keeps_the_structure(digits, small):
    original, x, test = digits
    taught = evaluate.predict(original, test)
    before = evaluate.agreement(taught, evaluate.predict(small.model, test))
    weights = jax.tree.map(jnp.copy, nnx.state(original))
    done = ua.match_outputs(small, original, x, RECIPE)
    after = evaluate.agreement(taught, evaluate.predict(done.model, test))
    assert after["kl"] < 0.8 * before["kl"]
    assert after["top1"] >= before["top1"]
    for old, new in zip(jax.tree.leaves(nnx.state(small.model)), jax.tree.leaves(nnx.state(done.model)), strict=True):
        assert old.shape == new.shape
        if jnp.issubdtype(old.dtype, jnp.integer):
            np.testing.assert_array_equal(old, new)
    jax.tree.map(np.testing.assert_array_equal, weights, nnx.state(original))
    assert executions(done.model) == executions(small.model)


def test_matching_a_block_brings_it_nearer_and_leaves_later_layers(digits, whole):
    original, x, test = digits
    done = ua.match_outputs(whole, original, x, RECIPE, blocks=["conv[23]"])
    for name in ("conv2", "conv3"):
        assert block_error(original, done.model, test, name) < block_error(original, whole.model, test, name)
    for old, new in zip(*(jax.tree.leaves(nnx.state(m.fc)) for m in (whole.model, done.model)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_epoch_that_matches_best_is_kept(digits, small, tmp_path):
    original, x, test = digits
    recipe = ua.Recipe(epochs=3, batch_size=64, augment=None)
    wild = optax.sgd(lambda step: jnp.where(step < len(x) // 64, 1e-3, 3.0))
    arguments = {"validation": test, "optimizer": wild, "checkpoint_dir": tmp_path / "c"}
    done = ua.match_outputs(small, original, x, recipe, patience=1, **arguments)
    losses = [line.validation_loss for line in done.history]
    assert len(done.history) == 2
    assert done.best == 1
    assert [line.accuracy for line in done.history] == [None, None]
    kl = OutputMatch(temperature=recipe.temperature).loss(
        [jnp.asarray(evaluate.predict(done.model, test))], [jnp.asarray(evaluate.predict(original, test))]
    )
    assert losses[0] == pytest.approx(float(kl), rel=1e-3)
    with pytest.raises(ValueError, match="its objective differs"):
        ua.match_outputs(small, original, x, recipe, blocks=["fc"], checkpoint_dir=tmp_path / "c")


@pytest.fixture(scope="module")
def normed():
    return build(lambda: zoo.create("digits", batch_norm=True))


def test_batch_norms_run_as_in_use(digits, normed):
    """Matching a network to itself changes neither weights nor running statistics."""
    done = ua.match_outputs(normed, normed, digits[1][:64], ua.Recipe(epochs=1, augment=None, weight_decay=0.0))
    for old, new in zip(*(jax.tree.leaves(nnx.state(m)) for m in (normed, done.model)), strict=True):
        np.testing.assert_allclose(old, new, atol=1e-5)


def test_a_layer_that_took_over_a_batch_norm_is_no_block_but_the_norm_is(digits, normed):
    rules = [ua.Rule(path="conv2", budget=ua.Budget(params=0.5)), ua.Rule(path=".*", keep=True)]
    x = digits[1][:64]
    small = ua.compress(normed, x, rules=rules, **QUIET)
    with pytest.raises(ValueError, match="blocks: 'conv[12]' is a compressed layer, which may hold the batch norm"):
        ua.match_outputs(small, normed, x, RECIPE, blocks=["conv."])
    done = ua.match_outputs(small, normed, x, RECIPE, blocks=["bn2"])
    assert block_error(normed, done.model, x, "bn2") < block_error(normed, small.model, x, "bn2")


def test_the_default_recipe_does_not_shrink_what_it_does_not_see():
    assert MATCH_RECIPE.weight_decay == 0


def test_a_block_inside_a_transformation_is_refused():
    network = build(nested)
    with pytest.raises(ValueError, match="blocks: the output of a cannot be taken"):
        ua.match_outputs(network, network, np.ones((4, 8, 8, 3), np.float32), RECIPE, blocks=["a"])


def test_a_block_that_lost_channels_is_named(digits, small):
    with pytest.raises(ValueError, match=r"blocks: .conv1. gives .*8, 8, \d+\)\], the original.s .*8, 8, 32\)"):
        ua.match_outputs(small, digits[0], digits[1], RECIPE, blocks=["conv1", "fc"])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["conv9"], r"'conv9' matches no module of both networks; there are: .*conv1.*fc"),
        (["("], r"blocks: '\(' is not a regular expression"),
        ([], r"blocks: \[\]; give a list of patterns"),
        ("conv1", "blocks: 'conv1'; give a list of patterns"),
    ],
)
def test_bad_blocks(digits, small, blocks, message):
    with pytest.raises(ValueError, match=message):
        ua.match_outputs(small, digits[0], digits[1], RECIPE, blocks=blocks)


def test_bad_arguments(digits, small):
    original, x, test = digits
    other = zoo.create("digits")
    other.fc = nnx.Linear(1024, 7, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"original: outputs of shapes \[\(1, 7\)\].*\[\(1, 10\)\]"):
        ua.match_outputs(small, other, x, RECIPE)
    with pytest.raises(ValueError, match="validation: a tuple"):
        ua.match_outputs(small, original, x, RECIPE, validation=(test, np.zeros(len(test), int)))
    with pytest.raises(ValueError, match="patience"):
        ua.match_outputs(small, original, x, RECIPE, patience=1)
