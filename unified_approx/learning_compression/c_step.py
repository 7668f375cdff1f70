"""The C step of one piece and its multipliers, compiled once for each compression and shape."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from solvers.compressions import Compression
from solvers.compressions.base import Theta, objective


class CStep(NamedTuple):
    """What a C step gives.

    Attributes:
        theta: the compressed form.
        dual: multipliers after their update.
        before: objective of the C step at the theta before.
        after: at the new one.
    """

    theta: Theta
    dual: Float[Array, "..."]
    before: Float[Array, ""]
    after: Float[Array, ""]


@partial(jax.jit, static_argnums=0)
def direct(compression: Compression, w: Float[Array, "..."]) -> Theta:
    """The C step at mu = 0, without a start: direct compression."""
    return compression.compress(w, jnp.zeros((), w.dtype))


@partial(jax.jit, static_argnums=0)
def c_step(
    compression: Compression,
    w: Float[Array, "..."],
    dual: Float[Array, "..."],
    mu: Float[ArrayLike, ""],
    theta: Theta,
    dual_step: Float[ArrayLike, ""],
) -> CStep:
    """argmin over theta of penalty(theta) + mu/2 ||w - dual/mu - Delta(theta)||^2, and the multipliers after it:
    dual - dual_step (w - Delta(theta)).

    Args:
        compression: static.
        w: weights.
        dual: multipliers.
        mu: weight of the penalty.
        theta: where it starts.
        dual_step: mu, or 0 to leave the multipliers alone.
    """
    aim = w - dual / mu
    before = objective(compression, theta, aim, mu)
    new = compression.compress(aim, mu, theta)
    after = objective(compression, new, aim, mu)
    return CStep(new, dual - dual_step * (w - compression.decompress(new)), before, after)


@partial(jax.jit, static_argnums=0)
def target(
    compression: Compression, theta: Theta, dual: Float[Array, "..."], mu: Float[ArrayLike, ""]
) -> Float[Array, "..."]:
    """Delta(theta) + dual / mu: what an L step is pulled towards."""
    return compression.decompress(theta) + dual / mu


@partial(jax.jit, static_argnums=0)
def squared_gap(
    compression: Compression, theta: Theta, w: Float[Array, "..."]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """||w - Delta(theta)||^2 and ||w||^2."""
    return jnp.sum((w - compression.decompress(theta)) ** 2), jnp.sum(w * w)
