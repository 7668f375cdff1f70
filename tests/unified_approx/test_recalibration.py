"""Statistics of batch norms from data."""

import jax
import numpy as np
import pytest
from flax import nnx

import unified_approx as ua
from unified_approx import evaluate


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.fc, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, momentum=0.7, rngs=rngs)
        self.dropout, self.out = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(self.fc(x))))


def test_statistics_are_those_of_the_data():
    model, x = Net(), np.random.default_rng(0).normal(2.0, 3.0, size=(61, 3)).astype(np.float32)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))]
    new = ua.recalibrate_norms(model, x, batch_size=20)
    response = np.asarray(model.fc(x[:60])).reshape(3, 20, 4)
    np.testing.assert_allclose(new.norm.mean[...], response.mean((0, 1)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new.norm.var[...], response.var(1).mean(0), rtol=1e-4)
    assert new.norm.momentum == 0.7
    normal = (np.asarray(new.fc(x)) - response.mean((0, 1))) / np.sqrt(response.var(1).mean(0) + 1e-5)
    np.testing.assert_allclose(evaluate.predict(new, x), new.out(normal), atol=1e-4)  # in use, without dropout
    for old, leaf in zip(before, jax.tree.leaves(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))), strict=True):
        np.testing.assert_array_equal(old, leaf)


def test_what_cannot_be_recalibrated():
    x = np.ones((5, 3), np.float32)
    with pytest.raises(ValueError, match="no batch norm"):
        ua.recalibrate_norms(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), x, batch_size=2)
    with pytest.raises(ValueError, match="batch_size: 9 of 5"):
        ua.recalibrate_norms(Net(), x, batch_size=9)
