"""Convolutions to very small images as matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unified_approx.tiny import as_products


class Small(nnx.Module):
    """Convolutions to 4 x 4, 2 x 2 (inside a jit of its own) and, dilated, 2 x 2."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.second = nnx.Conv(4, 5, (3, 3), strides=2, rngs=rngs)
        self.third = nnx.Conv(5, 6, (3, 3), kernel_dilation=2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return nnx.relu(self.third(jax.jit(nnx.relu)(nnx.jit(lambda layer, x: layer(x))(self.second, x))))


def loss(params, rest, graphdef, x):
    model = nnx.merge(graphdef, params, rest, copy=True)
    value = jnp.sum(model(x) ** 2)
    return value, nnx.state(model, nnx.BatchStat)


def convolutions(function, *args):
    """Output shapes of all convolutions, derivatives included."""
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                found.append(eqn.outvars[0].aval.shape)
            for part in jax.tree.leaves(dict(eqn.params), is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@pytest.mark.parametrize("train", [True, False])
def test_same_values_and_gradients(train):
    model = Small()
    model.train() if train else model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 4, 4, 3)), jnp.float32)

    def gradient(function):
        return jax.jit(
            lambda params, rest, x: jax.value_and_grad(
                function(lambda params, rest, x: loss(params, rest, graphdef, x)), has_aux=True
            )(params, rest, x)
        )

    plain, products = gradient(lambda f: f), gradient(as_products)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), *(
        f(params, rest, x) for f in (plain, products)
    ))  # fmt: skip
    assert len(convolutions(plain, params, rest, x)) >= 8
    assert all(shape[1:3] != (2, 2) for shape in convolutions(products, params, rest, x))


def test_nothing_tiny_is_left_alone():
    kernel, x = jnp.ones((3, 3, 1, 2)), jnp.ones((1, 6, 6, 1))

    def function(x):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert len(convolutions(as_products(function), x)) == 1
    np.testing.assert_array_equal(as_products(function)(x), function(x))


def test_operands_without_arguments_keep_their_place():
    kernel = jnp.ones((1, 1, 2, 2))

    def function(x, unused, nested):
        out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return {"out": out, "more": (nested["b"], 2.0 * nested["a"])}

    x, nested = jnp.arange(8.0).reshape(1, 2, 2, 2), {"a": jnp.ones(3), "b": jnp.zeros(2)}
    found = as_products(function)(x, None, nested)
    jax.tree.map(np.testing.assert_array_equal, found, function(x, None, nested))
