"""What a training run minimises: labels (and a teacher's answers), or another network's outputs alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int

from unified_approx.distances import divergence, floating, output_distance, relative_gap
from unified_approx.layers import Factored
from unified_approx.sites import Path, path_name
from unified_approx.tap import outputs_of

Forward = Callable[[Any, Any], Any]


@runtime_checkable
class Objective(Protocol):
    """A frozen, hashable dataclass: static under jit.

    Attributes:
        needs_labels: whether `loss` reads labels; without, validation measures the loss itself.
        needs_teacher: whether `loss` reads what the teacher did.
        training_mode: whether the network runs in training mode: batch norms use and follow the batch, dropout is on.
    """

    needs_labels: ClassVar[bool]
    needs_teacher: ClassVar[bool]
    training_mode: ClassVar[bool]

    def observe(self, call: Forward, model: nnx.Module, x: Array) -> Any:
        """What `loss` reads of a run of a network, the student or the teacher."""
        ...

    def loss(self, student: Any, teacher: Any, labels: Int[Array, " batch"] | None) -> Float[Array, ""]:
        """The mean over the batch. `student` and `teacher` were observed; teacher and labels are None without any."""
        ...


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Cross entropy with the labels; with a teacher (1 - distill) of it, plus distill T^2 KL(teacher || student).

    Attributes:
        label_smoothing: share of the target that goes to all classes alike.
        distill: weight of the teacher's answers.
        temperature: T of both softmaxes.
    """

    needs_labels: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    training_mode: ClassVar[bool] = True
    label_smoothing: float = 0.0
    distill: float = 0.9
    temperature: float = 2.0

    def observe(self, call: Forward, model: nnx.Module, x: Array) -> Any:
        """The logits."""
        return call(model, x)

    def loss(
        self,
        student: Float[Array, "batch classes"],
        teacher: Float[Array, "batch classes"] | None,
        labels: Int[Array, " batch"] | None,
    ) -> Float[Array, ""]:
        """See the class."""
        target = jax.nn.one_hot(labels, student.shape[1], dtype=student.dtype)
        hard = jnp.mean(optax.softmax_cross_entropy(student, optax.smooth_labels(target, self.label_smoothing)))
        if teacher is None:
            return hard
        soft = divergence(teacher, student, self.temperature) / len(student)
        return (1 - self.distill) * hard + self.distill * soft


@dataclass(frozen=True, kw_only=True)
class RegularizedCrossEntropy(CrossEntropy):
    """Cross entropy, plus l1 sum |w| + group sum_c ||w_c||_2 over all kernels, w_c the weights of one input feature.

    Of factored layers every factor counts as a kernel, w_c the weights of its last axis.

    Small weights (whole columns of a layer's matrix) shrink before they are pruned: Han et al. (2015), section 3.1.

    Attributes:
        l1: weight of the first.
        group: weight of the second.
    """

    l1: float = 0.0
    group: float = 0.0

    def __post_init__(self) -> None:
        for name in ("l1", "group"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}; give a number >= 0")

    def observe(self, call: Forward, model: nnx.Module, x: Array) -> Any:
        """The logits, and the penalty."""
        logits = call(model, x)
        kernels = [leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model)) if path[-1] == "kernel"]
        kernels += [factor for _, m in nnx.iter_modules(model) if isinstance(m, Factored) for factor in _factors(m)]
        absolute = sum((jnp.sum(jnp.abs(w)) for w in kernels), jnp.zeros(()))
        columns = sum((jnp.sum(_norms(w.reshape(-1, w.shape[-1]))) for w in kernels), jnp.zeros(()))
        return logits, self.l1 * absolute + self.group * columns

    def loss(self, student: Any, teacher: Any, labels: Int[Array, " batch"] | None) -> Float[Array, ""]:
        """See the class."""
        logits, penalty = student
        return super().loss(logits, None if teacher is None else teacher[0], labels) + penalty


def _factors(layer: Factored) -> list[Array]:
    """Those of a factored layer, also where they are computed from what is trained."""
    values = [leaf[...] for _, leaf in nnx.to_flat_state(nnx.state(layer))]
    return [value for value in values if value.ndim > 1 and jnp.issubdtype(value.dtype, jnp.floating)]


def _norms(rows: Float[Array, "rows n"]) -> Float[Array, " rows"]:
    """Of rows, with gradient 0 where a row is 0."""
    squares = jnp.sum(rows * rows, axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProductDecay:
    """weight/2 sum ||m||_F^2 over the matrices m that the factors of each factored layer make together.

    The decay that the layer had before it was factored: that of the factors' own values also draws their products to a
    lower rank. Idelbayev and Carreira-Perpinan (2020) train low-rank networks so.

    Attributes:
        weight: of the penalty.
    """

    weight: Float[ArrayLike, ""]

    def __call__(self, model: nnx.Module) -> Float[Array, ""]:
        """The penalty."""
        layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Factored)]
        return jnp.asarray(self.weight) / 2 * sum((jnp.sum(layer.kernel() ** 2) for layer in layers), jnp.zeros(()))


@dataclass(frozen=True, kw_only=True)
class OutputMatch:
    """The distance from the teacher's outputs, without labels; batch norms and dropout as in use.

    The network's output: T^2 KL(teacher || student) for logits, ||teacher - student||^2 / ||teacher||^2 otherwise. Or
    the outputs of blocks: the latter for each, and their mean.

    Attributes:
        temperature: T of both softmaxes.
        blocks: paths of modules; none: the network's own output.
    """

    needs_labels: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    training_mode: ClassVar[bool] = False
    temperature: float = 2.0
    blocks: tuple[Path, ...] = ()

    def observe(self, call: Forward, model: nnx.Module, x: Array) -> list[Array]:
        """The floating outputs of the network, or those of the blocks, call by call.

        Raises:
            ValueError: a block is not run.
        """
        return floating(call(model, x)) if not self.blocks else _block_outputs(call, model, x, self.blocks)

    def loss(self, student: list[Array], teacher: list[Array], labels: Array | None = None) -> Float[Array, ""]:
        """See the class."""
        pairs = list(zip(teacher, student, strict=True))
        if self.blocks:
            total = sum(relative_gap(*pair) for pair in pairs) / len(pairs)
        else:
            total = sum(output_distance(*pair, self.temperature) for pair in pairs)
        return jnp.asarray(total / len(student[0]))


def _block_outputs(call: Forward, model: nnx.Module, x: Array, blocks: tuple[Path, ...]) -> list[Array]:
    seen = outputs_of(model, blocks, lambda network: call(network, x))[1]
    silent = [path for path in blocks if not seen[path]]
    if silent:
        raise ValueError(f"blocks: {path_name(silent[0])!r} is not called when the network runs; name a module that is")
    return floating([seen[path] for path in blocks])
