"""Steps of training, compiled: one after the other in one call, or one a call where XLA's loops are slow."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from unified_approx.calling import Call
from unified_approx.kernel_gradients import for_gradients
from unified_approx.layers import FactoredConv
from unified_approx.objectives import Objective
from unified_approx.tiny import as_products

Prepare = Callable[[Array], Array]

MOVING = nnx.Any(nnx.BatchStat, nnx.RngState)
"""What a forward pass in training mode changes."""


class Inputs(NamedTuple):
    """What the steps of an epoch read and do not change.

    Attributes:
        x: all examples, unprepared.
        labels: theirs, or None.
        taught: state of the teacher, or None.
        fixed: what of the network neither is trained nor moves.
        penalty: `penalty(model)` is added to the objective; a pytree, or None.
    """

    x: Array
    labels: Array | None
    taught: Any
    fixed: Any
    penalty: Any = None


class Carry(NamedTuple):
    """What a step changes.

    Attributes:
        params: trained arrays.
        moving: running statistics and random number generators.
        optimizer: state of the optimizer.
        key: of the augmentation.
    """

    params: Any
    moving: Any
    optimizer: Any
    key: PRNGKeyArray


def augment_crop_flip(images: Shaped[Array, "batch h w c"], key: PRNGKeyArray) -> Shaped[Array, "batch h w c"]:
    """Pad by 4 (zeros), crop back at random, mirror half of the images."""
    size, height, width, _ = images.shape
    crop, flip = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    cut = crops(padded, jax.random.randint(crop, (size, 2), 0, 9), height, width)
    mirrored = jax.random.bernoulli(flip, 0.5, (size, 1, 1, 1))
    return jnp.where(mirrored, cut[:, :, ::-1], cut)


def crops(
    images: Shaped[Array, "batch rows columns c"], corners: Int[Array, "batch 2"], height: int, width: int
) -> Shaped[Array, "batch height width c"]:
    """From each image the part of that size whose first row and column are given."""
    return jax.vmap(
        lambda image, at: jax.lax.dynamic_slice_in_dim(
            jax.lax.dynamic_slice_in_dim(image, at[0], height, 0), at[1], width, 1
        )
    )(images, corners)


def runs_in_loops(model: nnx.Module) -> bool:
    """Whether many steps may be one compiled loop.

    Inside a loop XLA's CPU backend cannot choose the layout of a convolution, and the gradient with respect to a kernel
    takes 30 to 80 times as long (jax issue 12868).
    """
    convolutions = (nnx.Conv, nnx.ConvTranspose, FactoredConv)
    return jax.default_backend() != "cpu" or not any(isinstance(m, convolutions) for _, m in nnx.iter_modules(model))


@dataclass(frozen=True)
class Loop:
    """Everything static of a training run, hashable for jit.

    Attributes:
        graphdef: of the network.
        teacher: graphdef of the teacher, or None.
        objective: what is minimised.
        augment: whether images are cropped and mirrored.
        transform: the optimizer.
        prepare: makes the network's input of a batch.
        call: how networks are called.
        in_one_call: `runs_in_loops` of the network.
    """

    graphdef: Any
    teacher: Any
    objective: Objective
    augment: bool
    transform: optax.GradientTransformation
    prepare: Prepare
    call: Call
    in_one_call: bool

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # That of a graphdef takes milliseconds, and every call asks for it.
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def loss(self, params: Any, moving: Any, inputs: Inputs, x: Array, labels: Array | None) -> tuple[Array, Any]:
        """The objective and the penalty on one prepared batch, and what moved."""
        # Copies: a running statistic cannot be updated from inside the trace of the gradient otherwise.
        model, see = nnx.merge(self.graphdef, params, moving, inputs.fixed, copy=True), self.objective.observe
        answers = None if self.teacher is None else see(self.call, nnx.merge(self.teacher, inputs.taught), x)
        value = self.objective.loss(see(self.call, model, x), answers, labels)
        if inputs.penalty is not None:
            value = value + inputs.penalty(model)
        return value, nnx.split(model, nnx.Param, MOVING, ...)[2]

    def steps(
        self,
        inputs: Inputs,
        carry: Carry,
        order: Int[np.ndarray, "steps batch"],
        rates: Float[np.ndarray, " steps"] | None = None,
    ) -> tuple[Carry, Float[Array, " steps"]]:
        """Several steps, which consume `carry`.

        Args:
            inputs: data and constants.
            carry: from the steps before.
            order: numbers of the examples of each step.
            rates: learning rate of each step, where the optimizer has it as an injected hyperparameter.

        Returns:
            The next carry, and the losses.
        """
        if self.in_one_call:
            return self._scan(inputs, carry, order, rates)
        values = []
        for i, index in enumerate(order):
            carry, value = self._single(inputs, carry, index, None if rates is None else rates[i])
            values.append(value)
        return carry, jnp.stack(values)

    @partial(jax.jit, static_argnums=0, donate_argnums=2)
    def _scan(self, inputs: Inputs, carry: Carry, order: Array, rates: Array | None) -> tuple[Carry, Array]:
        return jax.lax.scan(lambda carry, each: self._step(inputs, carry, *each), carry, (order, rates))

    @partial(jax.jit, static_argnums=0, donate_argnums=2)
    def _single(self, inputs: Inputs, carry: Carry, index: Array, rate: Array | None) -> tuple[Carry, Array]:
        return self._step(inputs, carry, index, rate)

    def _step(self, inputs: Inputs, carry: Carry, index: Array, rate: Array | None) -> tuple[Carry, Array]:
        key, images = carry.key, inputs.x[index]
        if self.augment:
            key, own = jax.random.split(key)
            images = augment_crop_flip(images, own)
        x = self.prepare(images)
        labels = None if inputs.labels is None else inputs.labels[index]
        gradient_of = jax.value_and_grad(for_gradients(self.loss), has_aux=True)
        (value, moving), gradient = gradient_of(carry.params, carry.moving, inputs, x, labels)
        state = carry.optimizer
        if rate is not None:
            state = optax.tree_utils.tree_set(state, learning_rate=rate)
        change, state = self.transform.update(gradient, state, carry.params)
        return Carry(optax.apply_updates(carry.params, change), moving, state, key), value

    @partial(jax.jit, static_argnums=0)
    def judge(
        self, inputs: Inputs, params: Any, moving: Any, x: Array, labels: Array | None = None
    ) -> Float[Array, ""]:
        """The objective on a batch that is not trained on."""
        return as_products(self.loss)(params, moving, inputs, self.prepare(x), labels)[0]
