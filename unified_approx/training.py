"""Training on one machine: epochs compiled as a whole, checkpoints that resume exactly."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from unified_approx.checkpoints import Checkpoints
from unified_approx.evaluate import Call, accuracy, forward

Prepare = Callable[[Array], Array]
_STEPS_PER_CALL = 50  # between two looks at the clock; nothing leaves the device in between


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the data.
        batch_size: examples per step.
        learning_rate: the highest of the one-cycle schedule (ignored with an optimizer of the user's).
        warmup: fraction of the steps in which it rises.
        momentum: of Nesterov's SGD.
        weight_decay: on kernels and factors, not on biases and norms.
        clip: largest norm of the gradient.
        augment: "crop_flip" pads images by 4, crops and mirrors them at random; None leaves them alone.
        label_smoothing: share of the target that goes to all classes alike.
        distill: weight of the teacher's answers against the labels, where there is a teacher.
        temperature: of both softmaxes in the distillation.
        seed: of the order, the augmentation and nothing else.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.05
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 5.0
    augment: Literal["crop_flip"] | None = "crop_flip"
    label_smoothing: float = 0.0
    distill: float = 0.9
    temperature: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; give at least 1")
        for name in ("warmup", "distill", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in [0, 1]")

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Nesterov's SGD with a one-cycle (linear up, cosine down) learning rate."""
        schedule = optax.warmup_cosine_decay_schedule(
            self.learning_rate / 25, self.learning_rate, max(1, round(self.warmup * steps)), steps
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.add_decayed_weights(self.weight_decay, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p)),
            optax.sgd(schedule, momentum=self.momentum, nesterov=True),
        )


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of the history: mean training loss, validation accuracy in percent (None without), seconds."""

    epoch: int
    loss: float
    accuracy: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The network after its best epoch (the last one where there was no validation), and the history."""

    model: nnx.Module
    history: tuple[Epoch, ...]
    best: int


def augment_crop_flip(images: Shaped[Array, "batch h w c"], key: PRNGKeyArray) -> Shaped[Array, "batch h w c"]:
    """Pad by 4 (zeros), crop back at random, mirror half of the images."""
    size, height, width, _ = images.shape
    crop, flip = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corner = jax.random.randint(crop, (size, 2), 0, 9)
    cut = jax.vmap(
        lambda image, at: jax.lax.dynamic_slice_in_dim(
            jax.lax.dynamic_slice_in_dim(image, at[0], height, 0), at[1], width, 1
        )
    )(padded, corner)
    mirrored = jax.random.bernoulli(flip, 0.5, (size, 1, 1, 1))
    return jnp.where(mirrored, cut[:, :, ::-1], cut)


def objective(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    taught: Float[Array, "batch classes"] | None,
    recipe: Recipe,
) -> Float[Array, ""]:
    """Cross entropy with the labels, and with a teacher T^2 KL(teacher || student) at temperature T (Hinton 2015)."""
    classes = logits.shape[1]
    target = optax.smooth_labels(jax.nn.one_hot(labels, classes, dtype=logits.dtype), recipe.label_smoothing)
    hard = jnp.mean(optax.softmax_cross_entropy(logits, target))
    if taught is None:
        return hard
    t = recipe.temperature
    soft = jnp.mean(optax.kl_divergence(jax.nn.log_softmax(logits / t), jax.nn.softmax(taught / t)))
    return (1 - recipe.distill) * hard + recipe.distill * t * t * soft


@dataclass(frozen=True)
class _Loop:
    """Everything static of a training run, hashable for jit."""

    graphdef: Any
    teacher: Any
    recipe: Recipe
    transform: Any
    prepare: Prepare
    call: Call

    def step(self, data: tuple[Array, Array], taught: Any, fixed: Any, carry: tuple, index: Array) -> tuple:
        params, rest, state, key = carry
        key, own = jax.random.split(key)
        x = data[0][index]
        if self.recipe.augment is not None:
            x = augment_crop_flip(x, own)
        x = self.prepare(x)
        answers = None if self.teacher is None else self.call(nnx.merge(self.teacher, taught), x)

        def loss(params: Any) -> tuple[Array, Any]:
            # Copies, because a running statistic cannot be updated from inside the trace of the gradient otherwise.
            model = nnx.merge(self.graphdef, params, rest, fixed, copy=True)
            logits = self.call(model, x)
            return objective(logits, data[1][index], answers, self.recipe), nnx.split(
                model, nnx.Param, nnx.BatchStat, ...
            )[2]

        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        change, state = self.transform.update(gradient, state, params)
        return (optax.apply_updates(params, change), rest, state, key), value

    @partial(jax.jit, static_argnums=0, donate_argnums=4)
    def steps(self, data: Any, taught: Any, fixed: Any, carry: tuple, order: Array) -> tuple:
        """Several steps: order is (steps, batch) indices of examples."""
        return jax.lax.scan(partial(self.step, data, taught, fixed), carry, order)


def train(
    model: nnx.Module,
    x: Shaped[np.ndarray | Array, "examples ..."],
    y: Int[np.ndarray | Array, " labels"],
    recipe: Recipe = Recipe(),
    *,
    optimizer: optax.GradientTransformation | None = None,
    teacher: nnx.Module | None = None,
    validation: tuple[Any, Any] | None = None,
    patience: int | None = None,
    checkpoint_dir: str | PathLike[str] | None = None,
    prepare: Prepare = lambda x: x,
    progress: Callable[[Epoch], None] | None = None,
    call: Call = forward,
) -> Trained:
    """Train the Params of a network; everything else but running statistics stays as it is.

    Args:
        model: any NNX network that gives logits; it is not changed.
        x: images as the augmentation wants them, uint8 or float; `prepare` makes the network's input of them.
        y: labels.
        recipe: how.
        optimizer: in place of the recipe's.
        teacher: network whose answers are imitated as well, in evaluation mode.
        validation: (x, y), x unprepared; the epoch with the best accuracy on it is returned.
        patience: stop after so many epochs without a better one; needs validation.
        checkpoint_dir: a folder that is written after every epoch; a run that finds its own checkpoint there goes on,
            and ends with the weights that it would have had, uninterrupted.
        prepare: per batch, on the device: normalisation, say. Pass the same function each time.
        progress: called after every epoch.
        call: how the networks are called.

    Raises:
        ValueError: labels that do not fit, patience without validation, a checkpoint of another run or network.
    """
    _check(x, y, validation, patience)
    own = nnx.clone(model)
    own.train()
    graphdef, params, rest, fixed = nnx.split(own, nnx.Param, nnx.BatchStat, ...)
    batch = min(recipe.batch_size, len(x))
    per_epoch = len(x) // batch
    transform = optimizer or recipe.optimizer(recipe.epochs * per_epoch)
    taught_def, taught = (None, None) if teacher is None else nnx.split(_evaluating(teacher))
    loop = _Loop(graphdef, taught_def, recipe, transform, prepare, call)
    # A step donates what it is given, and a clone shares its arrays with the model.
    params, rest = jax.tree.map(jnp.copy, (params, rest))
    carry = (params, rest, transform.init(params), jax.random.key(recipe.seed))
    data = (jnp.asarray(x), jnp.asarray(y))
    history: list[Epoch] = []
    best: tuple[int, Any] = (0, jax.tree.map(jnp.copy, (params, rest)))
    store = None if checkpoint_dir is None else Checkpoints(checkpoint_dir, _identity(model, recipe, len(x)))
    if store is not None and (found := store.latest({"carry": carry, "best": best[1]})) is not None:
        carry, history = found["carry"], [Epoch(**line) for line in found["history"]]
        best = (_best_epoch(history), found["best"])
    while len(history) < recipe.epochs and not _is_over(history, patience):
        start, number = time.perf_counter(), len(history) + 1
        order = np.random.default_rng((recipe.seed, number)).permutation(len(x))[: per_epoch * batch]
        losses = []
        for part in np.array_split(order.reshape(per_epoch, batch), max(1, per_epoch // _STEPS_PER_CALL)):
            carry, values = loop.steps(data, taught, fixed, carry, jnp.asarray(part))
            losses.append(values)
        loss = float(jnp.mean(jnp.concatenate(losses)))
        score = None if validation is None else _score(graphdef, carry, fixed, validation, prepare, call)
        history.append(Epoch(epoch=number, loss=loss, accuracy=score, seconds=time.perf_counter() - start))
        if _best_epoch(history) == number:
            best = (number, jax.tree.map(jnp.copy, carry[:2]))
        if store is not None:
            lines = [asdict(line) for line in history]
            store.save(number, {"carry": carry, "best": best[1]}, lines)
        if progress is not None:
            progress(history[-1])
        if not np.isfinite(loss):
            break
    new = nnx.merge(graphdef, *best[1], fixed)
    new.eval()
    return Trained(model=new, history=tuple(history), best=best[0])


def _check(x: Any, y: Any, validation: Any, patience: int | None) -> None:
    if np.shape(y) != (len(x),) or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(
            f"y: {y.dtype} of shape {np.shape(y)}; give one integer label for each of the {len(x)} examples"
        )
    if patience is not None and validation is None:
        raise ValueError(f"patience: {patience} epochs without a better accuracy; that needs validation=(x, y)")


def _evaluating(model: nnx.Module) -> nnx.Module:
    copy = nnx.clone(model)
    copy.eval()
    return copy


def _identity(model: nnx.Module, recipe: Recipe, examples: int) -> dict[str, Any]:
    shapes = {"/".join(map(str, k)): list(v.shape) for k, v in nnx.to_flat_state(nnx.state(model))}
    return {"recipe": asdict(replace(recipe)), "examples": examples, "network": shapes}


def _best_epoch(history: list[Epoch]) -> int:
    """The epoch of best validation accuracy, the earliest of equals; the last one without validation."""
    if not history or history[-1].accuracy is None:
        return len(history)
    return max(history, key=lambda line: (line.accuracy or 0.0, -line.epoch)).epoch


def _is_over(history: list[Epoch], patience: int | None) -> bool:
    return patience is not None and bool(history) and len(history) - _best_epoch(history) >= patience


def _score(
    graphdef: Any, carry: tuple, fixed: PyTree, validation: tuple[Any, Any], prepare: Prepare, call: Call
) -> float:
    model = nnx.merge(graphdef, jax.tree.map(jnp.copy, carry[0]), jax.tree.map(jnp.copy, carry[1]), fixed)
    x, y = validation
    return accuracy(model, np.asarray(prepare(jnp.asarray(x))), y, call=call)
