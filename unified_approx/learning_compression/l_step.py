"""L steps: training with the penalty added to the loss, compiled as a whole where the network allows it."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int, Shaped

from unified_approx.calling import Call, forward
from unified_approx.files import fingerprint_of
from unified_approx.learning_compression.penalty import Penalty
from unified_approx.learning_compression.visible import name_of, settings_of
from unified_approx.loop import MOVING, Carry, Inputs, Loop, Prepare, runs_in_loops
from unified_approx.objectives import CrossEntropy, Objective

_INDEX_BYTES = 2**26  # of the examples' numbers of one call
_MEASURED = 1000  # examples at a time

MakeOptimizer = Callable[[Any], optax.GradientTransformation]


@runtime_checkable
class LStep(Protocol):
    """Anything that improves a network: `(model, penalty, step) -> model`. Add `penalty(model)` to your loss.

    Two more things are used where there are: `measure(model)`, the loss of a network without penalty, and `identity`,
    JSON-able, which must be the same for a run to be resumed.
    """

    def __call__(self, model: nnx.Module, penalty: Penalty, step: int) -> nnx.Module:
        """A network of lower loss(model) + penalty(model), started from `model`, which may be changed in place.

        Args:
            model: the network.
            penalty: of this step.
            step: number of the step, from 0. Anything random should follow from it, for runs that are resumed.
        """
        ...


class NotFiniteError(FloatingPointError):
    """An L step diverged."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast an L step learns.

    Attributes:
        epochs: of every L step.
        first_epochs: of the first one, 0 to skip it; None: the same.
        batch_size: examples per update.
        learning_rate: of the first epoch.
        decay: factor on the learning rate, per L step, or per epoch with `restart`.
        restart: begin every L step with `learning_rate` again.
        momentum: of Nesterov's SGD.
        seed: of the order of the examples and the augmentation.
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
        if self.first_epochs is not None and self.first_epochs < 0:
            raise ValueError(f"first_epochs: {self.first_epochs}; give at least 0")
        for name in ("learning_rate", "decay"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}; give a positive number")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: {self.momentum} is not in [0, 1)")

    def length(self, step: int) -> int:
        """Epochs of an L step, counted from 0."""
        return self.first_epochs if step == 0 and self.first_epochs is not None else self.epochs

    def rate(self, step: int, epoch: int) -> float:
        """Learning rate of an epoch of an L step."""
        return self.learning_rate * self.decay ** (epoch if self.restart else step)


def _as_given(x: Array) -> Array:
    return x


class SgdLStep:
    """Our L step: SGD with Nesterov's momentum on labelled examples, data and all on the device.

    The curvature of the penalty is mu: the learning rate is kept below 1 / mu, as the LC papers do.
    """

    def __init__(
        self,
        x: Shaped[np.ndarray | Array, "examples ..."],
        y: Int[np.ndarray | Array, " labels"],
        schedule: Schedule = Schedule(),
        *,
        objective: Objective | None = None,
        teacher: nnx.Module | None = None,
        optimizer: MakeOptimizer | None = None,
        augment: str | None = None,
        prepare: Prepare = _as_given,
        measured: int | None = None,
        call: Call = forward,
    ):
        """Put the data on the device.

        Args:
            x: images as the augmentation wants them, or what the network takes.
            y: labels.
            schedule: how long and how fast.
            objective: what is minimised; None: cross entropy with the labels.
            teacher: network whose answers an objective may read, in evaluation mode.
            optimizer: of a learning rate, in place of Nesterov's SGD.
            augment: "crop_flip" pads images by 4, crops and mirrors them at random.
            prepare: makes the network's input of a batch, on the device.
            measured: examples that `measure` looks at, the first ones; None: all.
            call: how the networks are called.

        Raises:
            ValueError: labels that do not fit, an objective whose teacher is missing, or nothing to measure on.
        """
        if np.shape(y) != (len(x),) or not np.issubdtype(np.asarray(y).dtype, np.integer):
            raise ValueError(f"y: {np.asarray(y).dtype} {np.shape(y)}; give an integer for each of {len(x)} examples")
        objective = objective or CrossEntropy(distill=0.0 if teacher is None else 0.5)
        if objective.needs_teacher and teacher is None:
            raise ValueError(f"teacher: None; {type(objective).__name__} imitates a network, give it")
        if measured is not None and measured < 1:
            raise ValueError(f"measured: {measured} examples; give at least 1, or None for all")
        if augment not in (None, "crop_flip"):
            raise ValueError(f"augment: {augment!r} is unknown; give 'crop_flip' or None")
        self.schedule, self._prepare, self._call, self._augment = schedule, prepare, call, augment is not None
        self._objective, self._measured = objective, min(len(x), measured or len(x))
        self._data = jnp.asarray(x), jnp.asarray(y)
        self._teacher = (None, None) if teacher is None else nnx.split(_evaluating(teacher))
        momentum = schedule.momentum
        make = optimizer or (lambda rate: optax.sgd(rate, momentum=momentum, nesterov=True))
        self._make = make
        named = optax.inject_hyperparams(lambda learning_rate: make(learning_rate))
        self._optimizer = named(learning_rate=schedule.learning_rate)

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        known = {
            "objective": repr(self._objective),
            "augment": self._augment,
            "measured": self._measured,
            "data": fingerprint_of(self._data),
            "optimizer": str(jax.tree.structure(self._optimizer.init({}))),
            "optimizer_settings": settings_of(self._make(1.0).update),
            "prepare": name_of(self._prepare),
            "call": name_of(self._call),
            "teacher": None if self._teacher[0] is None else fingerprint_of(nnx.to_pure_dict(self._teacher[1])),
        }
        return {**asdict(self.schedule), **known}

    def __call__(self, model: nnx.Module, penalty: Penalty, step: int) -> nnx.Module:
        """See `LStep`.

        Raises:
            NotFiniteError: the loss is not finite any more.
        """
        own = nnx.clone(model)
        own.train() if self._objective.training_mode else own.eval()
        graphdef, params, moving, fixed = nnx.split(own, nnx.Param, MOVING, ...)
        loop = self._loop(graphdef, runs_in_loops(own))
        inputs = Inputs(*self._data, self._teacher[1], fixed, penalty)
        params, moving = jax.tree.map(jnp.copy, (params, moving))  # steps consume what they are given
        carry = Carry(params, moving, self._optimizer.init(params), jax.random.key(self.schedule.seed + 1000003 * step))
        per_call = max(1, _INDEX_BYTES // (4 * len(self._data[0])))
        epochs = range(self.schedule.length(step))
        for start in epochs[::per_call]:
            each = [self._epoch(penalty, step, epoch) for epoch in epochs[start : start + per_call]]
            order, rates = (np.concatenate(part) for part in zip(*each, strict=True))
            carry, losses = loop.steps(inputs, carry, order, rates)
            _check_finite(np.asarray(losses), len(each[0][0]), start)
        new = nnx.merge(graphdef, carry.params, carry.moving, fixed)
        new.eval()
        return new

    def _loop(self, graphdef: Any, in_one_call: bool) -> Loop:
        arguments = (self._augment, self._optimizer, self._prepare, self._call, in_one_call)
        return Loop(graphdef, self._teacher[0], self._objective, *arguments)

    def _epoch(self, penalty: Penalty, step: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the examples of each batch, and the learning rates."""
        count = len(self._data[0])
        size = min(self.schedule.batch_size, count)
        order = np.random.default_rng((self.schedule.seed, step, epoch)).permutation(count)
        batches = order[: count // size * size].reshape(-1, size).astype(np.int32)
        rate = min(self.schedule.rate(step, epoch), 1 / max(float(penalty.mu), 1e-30))
        return batches, np.full(len(batches), rate, np.float32)

    def measure(self, model: nnx.Module) -> float:
        """Mean of the objective of a network, in evaluation mode, on the unaugmented data."""
        graphdef, params, moving, fixed = nnx.split(_evaluating(model), nnx.Param, MOVING, ...)
        loop = self._loop(graphdef, runs_in_loops(model))
        inputs = Inputs(*self._data, self._teacher[1], fixed)
        ends = [*range(0, self._measured, _MEASURED), self._measured]
        total = 0.0
        for a, b in itertools.pairwise(ends):
            x, y = (part[a:b] for part in self._data)
            total += (b - a) * loop.judge(inputs, params, moving, x, y)
        return float(total) / self._measured


def _check_finite(losses: np.ndarray, per_epoch: int, first_epoch: int) -> None:
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        epoch, batch = divmod(int(bad[0]), per_epoch)
        raise NotFiniteError(f"the loss is {losses[bad[0]]} in batch {batch + 1} of epoch {first_epoch + epoch + 1}")


def _evaluating(model: nnx.Module) -> nnx.Module:
    clone = nnx.clone(model)
    clone.eval()
    return clone
