"""The forms that train fastest compute the same, and the way back keeps the trained values and the old structure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import unified_approx as ua
from unified_approx.layers import Factored
from unified_approx.macs import factored_layers
from unified_approx.training_forms import as_before, for_training

RECIPE = ua.Recipe(epochs=1, batch_size=16, augment=None, learning_rate=0.01)


class Net(nnx.Module):
    """Convolutions onto 8x8, onto 2x2, one there that is used twice, and one there in groups."""

    def __init__(self, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.large = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.small = nnx.Conv(8, 8, (3, 3), strides=(4, 4), use_bias=False, param_dtype=dtype, rngs=rngs)
        self.twice = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.again = self.twice
        self.groups = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.small(nnx.relu(self.large(x))))
        x = nnx.relu(self.groups(self.again(nnx.relu(self.twice(x)))))
        return self.out(x.mean((1, 2)))


X = np.random.default_rng(0).standard_normal((32, 8, 8, 3)).astype(np.float32)
Y = np.arange(32) % 4


def kinds(model):
    return {name: type(getattr(model, name)).__name__ for name in ("large", "small", "twice", "again", "groups")}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_convolutions_onto_few_positions_become_products(dtype):
    model = Net(dtype)
    fast = for_training(model, X[:1])
    assert kinds(fast) == {
        "large": "Conv", "small": "FactoredConv", "twice": "FactoredConv", "again": "FactoredConv", "groups": "Conv",
    }  # fmt: skip
    assert fast.twice is fast.again
    assert fast.small.execution == fast.twice.execution == "matmul"
    np.testing.assert_allclose(fast(X), model(X), atol=1e-5)
    assert kinds(model)["small"] == "Conv"


def test_the_way_back_keeps_values_and_structure():
    model = Net()
    fast = for_training(model, X[:1])
    fast.small.terms[0].values[...] *= 2
    fast.twice.bias[...] += 1
    back = as_before(fast, model)
    assert nnx.graphdef(back) == nnx.graphdef(model)
    np.testing.assert_allclose(back.small.kernel[...], 2 * model.small.kernel[...])
    np.testing.assert_allclose(back.again.bias[...], model.twice.bias[...] + 1)
    np.testing.assert_allclose(back(X), fast(X), atol=1e-5)
    assert not model.twice.bias[...].any()


def test_factored_layers_come_back_in_their_forms():
    model = Net()
    options = {"form": "columns", "allocation": "uniform", "rows": 512, "progress": lambda e: None}
    small = ua.compress(model, X, budget=ua.Budget(params=0.6), **options).model
    wanted = {path: layer.execution for path, layer in factored_layers(small).items()}
    fast = for_training(small, X[:1])
    np.testing.assert_allclose(fast(jnp.asarray(X)), small(jnp.asarray(X)), atol=1e-5)
    assert {path: layer.execution for path, layer in factored_layers(as_before(fast, small)).items()} == wanted


def test_training_gives_what_it_gives_in_the_old_forms():
    model = Net()
    fast = ua.finetune(model, X, Y, RECIPE, original=model).model
    plain = ua.train(model, X, Y, RECIPE, teacher=model).model
    assert nnx.graphdef(fast) == nnx.graphdef(plain)
    assert not any(isinstance(getattr(fast, name), Factored) for name in kinds(fast))
    for left, right in zip(jax.tree.leaves(nnx.state(fast)), jax.tree.leaves(nnx.state(plain)), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    assert not np.array_equal(fast.small.kernel[...], model.small.kernel[...])
