"""Losses of outputs: gradients and Hessians against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from solvers.output_loss import LOSSES, OutputLoss

LABELS = {
    "cross_entropy": np.array([2, 0, 1]),
    "squared_error": np.asarray(np.random.default_rng(1).normal(size=(3, 4))),
}


@pytest.fixture
def z():
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))


@pytest.mark.parametrize("name", LOSSES)
def test_residuals_and_factors(name, z):
    loss, y = LOSSES[name], jnp.asarray(LABELS[name])
    assert isinstance(loss, OutputLoss)
    total = lambda z: jnp.sum(loss.values(z, y))  # noqa: E731
    np.testing.assert_allclose(loss.residuals(z, y), jax.grad(total)(z), atol=1e-12)
    exact = jax.hessian(total)(z)
    factors = jnp.stack([loss.factor(z, jnp.asarray(i)) for i in range(4)])
    for b in range(3):
        np.testing.assert_allclose(factors[:, b].T @ factors[:, b], exact[b, :, b], atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_samples_have_the_hessian_as_second_moment(name, z):
    loss = LOSSES[name]
    drawn = jax.vmap(lambda key: loss.sample(z, key))(jax.random.split(jax.random.key(0), 20_000))
    exact = sum(jnp.einsum("bi,bj->bij", u, u) for u in (loss.factor(z, jnp.asarray(i)) for i in range(4)))
    np.testing.assert_allclose(jnp.einsum("kbi,kbj->bij", drawn, drawn) / 20_000, exact, atol=0.05)


def test_cross_entropy_is_that_of_the_labels(z):
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        LOSSES["cross_entropy"].values(z, jnp.array([2, 0, 1])), -np.log(p[[0, 1, 2], [2, 0, 1]])
    )
