"""The M step by stochastic gradients, the paper's choice: any activation, any Optax optimiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from solvers.reconstruction import LayerProblem, preactivation, target_energy


def momentum_sgd(learning_rate: Float[Array, ""]) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum 0.9."""
    return optax.sgd(learning_rate, momentum=0.9)


class SgdPrepared(NamedTuple):
    """What `Sgd` computes once.

    Attributes:
        scale: weight of each output / energy of the target.
        max_curvature: largest eigenvalue of x'x times the largest scale.
    """

    scale: Float[Array, " n"]
    max_curvature: Float[Array, ""]


class SgdState(NamedTuple):
    """State of `Sgd`: current m, the optimiser's state (kept from step to step) and the random key."""

    m: Float[Array, "n p"]
    optimizer: Any
    key: Key[Array, ""]


def max_eigenvalue(x: Float[Array, "d p"], key: Key[Array, ""], num_steps: int = 30) -> Float[Array, ""]:
    """The largest eigenvalue of x'x by power iteration: never above it, and within a few per cent in 30 steps."""

    def body(_: Array, v: Array) -> Array:
        w = (x @ v) @ x
        norm = jnp.linalg.norm(w)
        return w / jnp.where(norm > 0, norm, 1)

    v = lax.fori_loop(0, num_steps, body, body(jnp.zeros(()), jax.random.normal(key, x.shape[1:], x.dtype)))
    return jnp.sum((x @ v) ** 2)


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """`steps` minibatch gradient steps on L(m) + t/2 ||m - target||^2 per M step; the same key gives the same result.

    The gradient of a batch is scaled by d / batch_size, so it is unbiased. Rows are drawn with replacement. With a ReLU
    the gradient vanishes wherever the response is negative, so start from a matrix that already responds (the
    layer's own) rather than from zero.

    Attributes:
        learning_rate: in units of 1 / (largest curvature of the loss + t), estimated once; below 2 for plain SGD.
        batch_size: rows of a minibatch.
        steps: minibatches per M step.
        optimizer: makes an Optax optimiser from the absolute learning rate. Pass a module-level function or an Optax
            factory such as `optax.adam`: it is static under jit, and a fresh lambda compiles anew.
    """

    learning_rate: float = 0.2
    batch_size: int = 256
    steps: int = 30
    optimizer: Callable[[Any], optax.GradientTransformation] = momentum_sgd

    def __post_init__(self) -> None:
        """Checks the options."""
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: pass a positive number, in units of 1/curvature")
        for name in ("batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: pass at least 1")

    def check(self, problem: LayerProblem) -> None:
        """Takes every activation."""

    def prepare(self, problem: LayerProblem) -> SgdPrepared:
        """The scale of the loss and its largest curvature."""
        weights = jnp.ones_like(problem.bias) if problem.weights is None else problem.weights
        scale = weights / target_energy(problem)
        curvature = jnp.max(scale) * max_eigenvalue(problem.x, jax.random.key(0))
        return SgdPrepared(scale, curvature)

    def init(
        self,
        problem: LayerProblem,
        prepared: SgdPrepared,
        m: Float[Array, "n p"],
        key: Key[Array, ""],
        t: Float[Array, ""],
    ) -> SgdState:
        """At m, with a fresh optimiser."""
        return SgdState(m, self._make(prepared, t).init(m), key)

    def step(
        self,
        problem: LayerProblem,
        prepared: SgdPrepared,
        state: SgdState,
        target: Float[Array, "n p"],
        t: Float[Array, ""],
    ) -> SgdState:
        """`steps` updates from fresh minibatches."""
        d = problem.x.shape[0]
        size = min(self.batch_size, d)
        key, draw = jax.random.split(state.key)
        rows = jax.random.randint(draw, (self.steps, size), 0, d)
        optimizer = self._make(prepared, t)
        scale = prepared.scale * (d / size)

        def batch_loss(m: Array, batch: Array) -> Array:
            offset = None if problem.offset is None else problem.offset[batch]
            z = preactivation(problem.x[batch], m, problem.bias, offset)
            gap = problem.y[batch] - problem.activation(z)
            return 0.5 * jnp.sum(scale * jnp.sum(gap * gap, axis=0))

        def update(carry: tuple[Array, Any], batch: Array) -> tuple[tuple[Array, Any], None]:
            m, inner = carry
            gradient = jax.grad(batch_loss)(m, batch) + t * (m - target)
            updates, inner = optimizer.update(gradient, inner, m)
            return (cast(Array, optax.apply_updates(m, updates)), inner), None

        (m, inner), _ = lax.scan(update, (state.m, state.optimizer), rows)
        return SgdState(m, inner, key)

    def _make(self, prepared: SgdPrepared, t: Array) -> optax.GradientTransformation:
        largest = prepared.max_curvature + t
        return self.optimizer(self.learning_rate / jnp.where(largest > 0, largest, 1))
