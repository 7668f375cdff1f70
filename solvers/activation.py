"""Elementwise activations as static values: a layer problem is compiled once per activation."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Activation:
    """An elementwise function r(.) that follows a layer, hashable so that it can be static under `jax.jit`.

    Attributes:
        name: how reports and files call it.
        function: elementwise, differentiable almost everywhere, shape- and dtype-preserving.
    """

    name: str
    function: Callable[[Array], Array]

    def __call__(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """r(z), elementwise."""
        return self.function(z)


def _relu(z: Array) -> Array:
    return jnp.maximum(z, jnp.zeros((), z.dtype))


def _identity(z: Array) -> Array:
    return z


RELU = Activation("relu", _relu)
IDENTITY = Activation("none", _identity)
NAMED = {
    a.name: a
    for a in (
        RELU,
        IDENTITY,
        Activation("relu6", jax.nn.relu6),
        Activation("leaky_relu", jax.nn.leaky_relu),
        Activation("tanh", jnp.tanh),
        Activation("sigmoid", jax.nn.sigmoid),
        Activation("silu", jax.nn.silu),
        Activation("gelu", jax.nn.gelu),
        Activation("elu", jax.nn.elu),
    )
}
