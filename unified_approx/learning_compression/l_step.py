"""L steps: training with the penalty added to the loss, epochs compiled as a whole."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from unified_approx.calling import Call, forward
from unified_approx.learning_compression.penalty import Penalty

Loss = Callable[[Float[Array, "batch classes"], Int[Array, " batch"]], Float[Array, ""]]


@runtime_checkable
class LStep(Protocol):
    """Anything that improves a network: `(model, penalty, step) -> model`. Add `penalty(model)` to your loss."""

    def __call__(self, model: nnx.Module, penalty: Penalty, step: int) -> nnx.Module:
        """A network of lower loss(model) + penalty(model), started from `model`."""
        ...


def cross_entropy(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Mean over the batch, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast an L step learns.

    Attributes:
        epochs: of every L step.
        first_epochs: of the first one; None: the same.
        batch_size: examples per update.
        learning_rate: of the first epoch.
        decay: factor on the learning rate, per L step, or per epoch with `restart`.
        restart: begin every L step with `learning_rate` again.
        momentum: of Nesterov's SGD.
        seed: of the order of the examples.
    """

    epochs: int = 10
    first_epochs: int | None = None
    batch_size: int = 256
    learning_rate: float = 0.1
    decay: float = 0.98
    restart: bool = False
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; give at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: {self.learning_rate}; give a positive number")

    def length(self, step: int) -> int:
        """Epochs of an L step, counted from 0."""
        return self.first_epochs if step == 0 and self.first_epochs is not None else self.epochs

    def rate(self, step: int, epoch: int) -> float:
        """Learning rate of an epoch of an L step."""
        return self.learning_rate * self.decay ** (epoch if self.restart else step)


class SgdLStep:
    """Our L step: SGD with Nesterov's momentum on the loss of labelled examples, data and all on the device.

    The norm of the gradient of the penalty is mu ||w - target||: the learning rate is kept below 1 / mu.
    """

    def __init__(
        self,
        x: Shaped[np.ndarray | Array, "examples ..."],
        y: Int[np.ndarray | Array, " examples"],
        schedule: Schedule = Schedule(),
        *,
        loss: Loss = cross_entropy,
        optimizer: Callable[[float], optax.GradientTransformation] | None = None,
        call: Call = forward,
    ):
        """Put the data on the device.

        Args:
            x: as the network takes them.
            y: labels.
            schedule: how long and how fast.
            loss: of the outputs and labels of a batch.
            optimizer: of a learning rate, in place of Nesterov's SGD.
            call: how the network is called.
        """
        if np.shape(y) != (len(x),):
            raise ValueError(f"y: of shape {np.shape(y)}; give one label for each of the {len(x)} examples")
        self.data = jnp.asarray(x), jnp.asarray(y)
        self.schedule, self._loss, self._call = schedule, loss, call
        momentum = schedule.momentum
        make = optimizer or (lambda rate: optax.sgd(rate, momentum=momentum, nesterov=True))
        named = optax.inject_hyperparams(lambda learning_rate: make(learning_rate))
        self._optimizer = named(learning_rate=schedule.learning_rate)

    def __call__(self, model: nnx.Module, penalty: Penalty, step: int) -> nnx.Module:
        """See `LStep`."""
        own = nnx.clone(model)
        own.train()
        graphdef, params, rest, fixed = nnx.split(own, nnx.Param, nnx.BatchStat, ...)
        carry = (params, rest, self._optimizer.init(params))
        size = min(self.schedule.batch_size, len(self.data[0]))
        for epoch in range(self.schedule.length(step)):
            order = np.random.default_rng((self.schedule.seed, step, epoch)).permutation(len(self.data[0]))
            index = jnp.asarray(order[: len(order) // size * size].reshape(-1, size))
            rate = min(self.schedule.rate(step, epoch), 1 / max(float(penalty.mu), 1e-30))
            carry = self._epoch(graphdef, fixed, carry, penalty, jnp.asarray(rate, jnp.float32), self.data, index)
        new = nnx.merge(graphdef, carry[0], carry[1], fixed)
        new.eval()
        return new

    @partial(jax.jit, static_argnums=(0, 1))
    def _epoch(
        self, graphdef: Any, fixed: Any, carry: tuple, penalty: Penalty, rate: Array, data: tuple, index: Array
    ) -> tuple:
        def loss(params: Any, rest: Any, x: Array, y: Array) -> tuple:
            model = nnx.merge(graphdef, params, rest, fixed, copy=True)
            value = self._loss(self._call(model, x), y) + penalty(model)
            return value, nnx.split(model, nnx.Param, nnx.BatchStat, ...)[2]

        def update(carry: tuple, rows: Array) -> tuple:
            params, rest, state = carry
            state.hyperparams["learning_rate"] = rate
            gradient, rest = jax.grad(loss, has_aux=True)(params, rest, data[0][rows], data[1][rows])
            change, state = self._optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, change), rest, state), None

        return jax.lax.scan(update, carry, index)[0]

    def measure(self, model: nnx.Module) -> float:
        """Mean loss of a network on the data."""
        clone = nnx.clone(model)
        clone.eval()
        return float(self._measure(*nnx.split(clone), self.data))

    @partial(jax.jit, static_argnums=(0, 1))
    def _measure(self, graphdef: Any, state: Any, data: tuple) -> Array:
        size = min(1000, len(data[0]))
        whole = len(data[0]) // size * size
        parts = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), data)
        each = jax.lax.map(lambda part: self._loss(self._call(nnx.merge(graphdef, state), part[0]), part[1]), parts)
        return jnp.mean(each)
