"""Training steps: one loop or one call each give the same; penalties count; dropout draws anew."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from unified_approx.calling import forward
from unified_approx.layers import FactoredConv, geometry_of
from unified_approx.loop import MOVING, Carry, Inputs, Loop, runs_in_loops
from unified_approx.objectives import CrossEntropy


class Net(nnx.Module):
    def __init__(self, dropout=0.0):
        rngs = nnx.Rngs(0)
        self.one, self.two = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.bn = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        return self.two(self.dropout(nnx.relu(self.bn(self.one(x)))))


def as_given(x):
    return x


def run(model, in_one_call, rates=None, penalty=None, learning_rate=0.1):
    graphdef, params, moving, fixed = nnx.split(model, nnx.Param, MOVING, ...)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=learning_rate)
    loop = Loop(graphdef, None, CrossEntropy(distill=0.0), False, optimizer, as_given, forward, in_one_call)
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(20, 6)), jnp.float32), jnp.asarray(rng.integers(0, 3, 20))
    params, moving = jax.tree.map(jnp.copy, (params, moving))
    carry = Carry(params, moving, optimizer.init(params), jax.random.key(0))
    return loop.steps(
        Inputs(x, y, None, fixed, penalty), carry, np.zeros((4, 5), np.int32) + np.arange(5, dtype=np.int32), rates
    )


def test_one_loop_or_one_call_each():
    (a, losses), (b, again) = (run(Net(), in_one_call) for in_one_call in (True, False))
    np.testing.assert_allclose(losses, again, rtol=1e-5)
    for own, other in zip(jax.tree.leaves(a[:2]), jax.tree.leaves(b[:2]), strict=True):
        if not jnp.issubdtype(own.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_one_call", [True, False])
def test_rates_and_penalties(in_one_call):
    model = Net()
    still, _ = run(model, in_one_call, rates=np.zeros(4, np.float32))
    for own, other in zip(jax.tree.leaves(still.params), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True):
        np.testing.assert_array_equal(own, other)
    penalty = jax.tree_util.Partial(lambda weight, net: weight * jnp.sum(net.two.kernel[...] ** 2), jnp.asarray(5.0))
    _, plain = run(model, in_one_call)
    _, pulled = run(model, in_one_call, penalty=penalty)
    assert float(pulled[0] - plain[0]) == pytest.approx(5 * float(jnp.sum(model.two.kernel[...] ** 2)), rel=1e-4)
    assert float(pulled[-1]) < float(pulled[0])


@pytest.mark.parametrize("in_one_call", [True, False])
def test_dropout_draws_anew_in_every_step(in_one_call):
    _, losses = run(Net(dropout=0.5), in_one_call, rates=np.zeros(4, np.float32))  # the same batch four times
    assert len(set(np.asarray(losses).tolist())) == 4


def test_networks_with_convolutions_are_not_run_in_loops():
    class Convolutional(nnx.Module):
        def __init__(self, layer):
            self.layer = layer

    conv = nnx.Conv(1, 1, (3, 3), rngs=nnx.Rngs(0))
    factored = FactoredConv.from_terms((), None, geometry_of(conv))
    on_cpu = jax.default_backend() == "cpu"
    assert runs_in_loops(Net())
    for layer in (conv, factored):
        assert runs_in_loops(Convolutional(layer)) != on_cpu
