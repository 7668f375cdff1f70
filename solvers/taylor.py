"""Quadratic models of a loss around trained weights, and compression that knows the loss by such a model alone.

Carreira-Perpinan & Zharmagambetov (2018), Fast model compression: the Learning-Compression algorithm whose L step is a
closed form. Multipliers as in `unified_approx.learning_compression`: the constraint is w - Delta(theta) = 0, the C step
sees w - dual / mu, and dual <- dual - mu (w - Delta(theta)).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from solvers.compressions.base import Compression, Theta


@runtime_checkable
class Quadratic(Protocol):
    """A pytree: a model of the loss, as far as it differs from the loss at the trained weights."""

    def value(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        """Loss at w less the loss at the trained weights."""
        ...

    def l_step(self, target: Float[Array, "..."], mu: Float[ArrayLike, ""]) -> Float[Array, "..."]:
        """argmin over w of value(w) + mu/2 ||w - target||^2; mu must exceed minus the least curvature."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Taylor:
    """g . (x - w) + 1/2 sum_i h_i (x_i - w_i)^2.

    A weight whose h is zero, negative, or below the rounding of the largest is *flat*: the model has no minimum along
    it that could be trusted. `minimum` leaves it where it is, and `curvature` is 0 there. `damped` makes every h
    positive.

    Attributes:
        w: trained weights.
        g: gradient of the loss there; zeros for the model of optimal brain damage.
        h: diagonal of the Hessian, or of its Gauss-Newton or Fisher form, there; zeros for a first-order model.
    """

    w: Float[Array, "..."]
    g: Float[Array, "..."]
    h: Float[Array, "..."]

    def value(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        """See `Quadratic.value`."""
        return jnp.sum(self._each(w))

    def l_step(self, target: Float[Array, "..."], mu: Float[ArrayLike, ""]) -> Float[Array, "..."]:
        """(h w + mu target - g) / (h + mu): with target = Delta + dual / mu, ibid., equation of the L step."""
        mu = jnp.asarray(mu, self.w.dtype)
        return (self.h * self.w + mu * target - self.g) / (self.h + mu)

    def minimum(self) -> Float[Array, "..."]:
        """w - g/h; w where it is flat."""
        curvature = self.curvature()
        return self.w - jnp.where(curvature > 0, self.g / jnp.where(curvature > 0, curvature, 1), 0)

    def curvature(self) -> Float[Array, "..."]:
        """H, and 0 where it is flat."""
        least = jnp.finfo(self.h.dtype).eps * jnp.max(jnp.abs(self.h), initial=0)
        return jnp.where(self.h > least, self.h, 0)

    def saliency(self) -> Float[Array, "..."]:
        """What a weight at 0 costs more than at `minimum`: 1/2 h (w - g/h)^2; 1/2 h w^2 - g w where it is flat.

        LeCun, Denker & Solla (1990), Optimal brain damage, equation 5, is the case g = 0.
        """
        minimum, curvature = self.minimum(), self.curvature()
        return jnp.where(curvature > 0, curvature / 2 * minimum * minimum, self._each(jnp.zeros_like(self.w)))

    def damped(self, amount: Float[ArrayLike, ""]) -> "Taylor":
        """With max(h, 0) + amount as curvature: what Levenberg and Marquardt add keeps the minimum near w."""
        return replace(self, h=jnp.maximum(self.h, 0) + jnp.asarray(amount, self.h.dtype))

    def without_gradient(self) -> "Taylor":
        """With g = 0: w is taken to be a minimum, as it is in optimal brain damage."""
        return replace(self, g=jnp.zeros_like(self.g))

    def _each(self, w: Float[Array, "..."]) -> Float[Array, "..."]:
        change = w - self.w
        return self.g * change + self.h / 2 * change * change


class Alternation(NamedTuple):
    """What an alternation found.

    Attributes:
        theta: of the lowest value(Delta(theta)) + penalty(theta), direct compression included.
        loss: that value.
        gaps: ||w - Delta(theta)|| / ||w|| after each step.
    """

    theta: Theta
    loss: Float[Array, ""]
    gaps: Float[Array, " steps"]


@partial(jax.jit, static_argnames=("compression", "augmented"))
def alternate(
    quadratic: Quadratic,
    w: Float[Array, "..."],
    compression: Compression,
    mus: Float[Array, " steps"],
    *,
    augmented: bool = True,
) -> Alternation:
    """min value(w) + penalty(theta) subject to w = Delta(theta), by L and C steps, all of them in one compiled loop.

    Args:
        quadratic: the loss.
        w: trained weights: direct compression is where it starts.
        compression: of all of w.
        mus: increasing, positive.
        augmented: keep multipliers (the augmented Lagrangian); otherwise the quadratic penalty method.
    """

    def delta(theta: Theta) -> Float[Array, "..."]:
        return compression.decompress(theta).astype(w.dtype)

    def loss_of(theta: Theta) -> Float[Array, ""]:
        return quadratic.value(delta(theta)) + compression.penalty(theta).astype(w.dtype)

    def step(carry: tuple, mu: Array) -> tuple:
        theta, dual, best, least = carry
        moved = quadratic.l_step(delta(theta) + dual / mu, mu)
        theta = compression.compress(moved - dual / mu, mu, theta)
        gap = moved - delta(theta)
        loss = loss_of(theta)
        better = loss < least
        best = jax.tree.map(partial(jnp.where, better), theta, best)
        carry = theta, dual - mu * gap if augmented else dual, best, jnp.where(better, loss, least)
        return carry, jnp.linalg.norm(gap.reshape(-1)) / jnp.linalg.norm(moved.reshape(-1))

    direct = compression.compress(w, jnp.zeros((), w.dtype))
    start = (direct, jnp.zeros_like(w), direct, loss_of(direct))
    (_, _, best, least), gaps = lax.scan(step, start, mus)
    return Alternation(best, least, gaps)
