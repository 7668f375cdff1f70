"""Losses of a network's outputs: their gradients, and vectors whose outer products add up to their Hessians."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped


@runtime_checkable
class OutputLoss(Protocol):
    """A frozen dataclass. Outputs z are (batch, c); every vector below has that shape, one row an example."""

    def values(self, z: Float[Array, "batch c"], y: Shaped[Array, "batch ..."]) -> Float[Array, " batch"]:
        """The loss of each example."""
        ...

    def residuals(self, z: Float[Array, "batch c"], y: Shaped[Array, "batch ..."]) -> Float[Array, "batch c"]:
        """Its gradient with respect to z."""
        ...

    def factor(self, z: Float[Array, "batch c"], i: Int[Array, ""]) -> Float[Array, "batch c"]:
        """u_i, i = 0 ... c - 1: the sum of u_i u_i' is the Hessian with respect to z."""
        ...

    def sample(self, z: Float[Array, "batch c"], key: PRNGKeyArray) -> Float[Array, "batch c"]:
        """A random u with E[u u'] the Hessian: minus the score of a label drawn from the model itself."""
        ...


@dataclass(frozen=True)
class Softmax:
    """Cross entropy of softmax(z) with integer labels, in nats; the Hessian is diag(p) - p p'."""

    def values(self, z: Float[Array, "batch c"], y: Int[Array, " batch"]) -> Float[Array, " batch"]:
        """See `OutputLoss`."""
        return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1)[:, 0]

    def residuals(self, z: Float[Array, "batch c"], y: Int[Array, " batch"]) -> Float[Array, "batch c"]:
        """Softmax(z) less the one-hot label."""
        return jax.nn.softmax(z) - jax.nn.one_hot(y, z.shape[1], dtype=z.dtype)

    def factor(self, z: Float[Array, "batch c"], i: Int[Array, ""]) -> Float[Array, "batch c"]:
        """sqrt(p_i) (p - e_i)."""
        p = jax.nn.softmax(z)
        return jnp.sqrt(p[:, i])[:, None] * (p - jax.nn.one_hot(i, z.shape[1], dtype=z.dtype)[None, :])

    def sample(self, z: Float[Array, "batch c"], key: PRNGKeyArray) -> Float[Array, "batch c"]:
        """Residuals of labels drawn with the probabilities p."""
        return self.residuals(z, jax.random.categorical(key, z))


@dataclass(frozen=True)
class SquaredError:
    """1/2 ||z - y||^2; the Hessian is the identity."""

    def values(self, z: Float[Array, "batch c"], y: Float[Array, "batch c"]) -> Float[Array, " batch"]:
        """See `OutputLoss`."""
        return jnp.sum((z - y) ** 2, axis=1) / 2

    def residuals(self, z: Float[Array, "batch c"], y: Float[Array, "batch c"]) -> Float[Array, "batch c"]:
        """z - y."""
        return z - y

    def factor(self, z: Float[Array, "batch c"], i: Int[Array, ""]) -> Float[Array, "batch c"]:
        """The i-th unit vector."""
        return jnp.broadcast_to(jax.nn.one_hot(i, z.shape[1], dtype=z.dtype), z.shape)

    def sample(self, z: Float[Array, "batch c"], key: PRNGKeyArray) -> Float[Array, "batch c"]:
        """Standard normal."""
        return jax.random.normal(key, z.shape, z.dtype)


LOSSES: Mapping[str, OutputLoss] = {"cross_entropy": Softmax(), "squared_error": SquaredError()}
"""By the names that users give."""
