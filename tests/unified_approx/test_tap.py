"""Outputs of modules: nested, shared, in containers; the network is as before."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import build, containers, nested, shared

from unified_approx.assemble import modules
from unified_approx.tap import outputs_of
from unified_approx.zoo import create


def test_nested_blocks_and_containers_are_seen_and_the_network_is_restored():
    model, x = create("resnet20"), jnp.ones((2, 32, 32, 3))
    model.eval()
    before = modules(model)
    paths = (("blocks", 0), ("blocks", 0, "conv1"), ("fc",))
    out, seen = outputs_of(model, paths, lambda m: m(x))
    assert list(seen) == list(paths)
    np.testing.assert_array_equal(seen["fc",][0], out)
    np.testing.assert_allclose(
        seen["blocks", 0, "conv1"][0], model.blocks[0].conv1(nnx.relu(model.bn1(model.conv1(x))))
    )
    after = modules(model)
    assert all(after[path] is module for path, module in before.items())
    np.testing.assert_array_equal(model(x), out)


@pytest.mark.parametrize("make", [containers, shared])
def test_every_module_that_gives_arrays_can_be_taken(make):
    model = build(make)
    x = jnp.ones((2, 8, 8, 3)) if make is shared else jnp.ones((2, 6))
    paths = [path for path, module in modules(model).items() if isinstance(module, nnx.Conv | nnx.Linear)]
    out, seen = outputs_of(model, paths, lambda m: m(x))
    np.testing.assert_array_equal(out, model(x))
    assert all(seen[path] for path in paths)


def test_the_network_is_restored_after_an_error():
    model = build(nested)
    before = modules(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        outputs_of(model, [("c",)], lambda m: (_ for _ in ()).throw(RuntimeError("on purpose")))
    assert all(modules(model)[path] is module for path, module in before.items())
