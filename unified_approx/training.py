"""Training on one machine: epochs compiled as a whole, checkpoints that resume exactly."""

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int, PyTree, Shaped

from unified_approx.calling import Call, forward
from unified_approx.checkpoints import Checkpoints
from unified_approx.evaluate import accuracy
from unified_approx.files import fingerprint_of
from unified_approx.loop import MOVING, Carry, Inputs, Loop, Prepare, runs_in_loops
from unified_approx.objectives import CrossEntropy, Objective, ProductDecay

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
        weight_decay: w for w/2 of the sum of squares, of kernels and factors, not of biases and norms.
        decay_products: whether it is taken of the matrix that a layer's factors make, in place of each factor's values.
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
    decay_products: bool = False
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
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}; give a positive number")

    def objective(self) -> CrossEntropy:
        """Labels, and a teacher's answers if there is a teacher."""
        return CrossEntropy(label_smoothing=self.label_smoothing, distill=self.distill, temperature=self.temperature)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Nesterov's SGD with a one-cycle (linear up, cosine down) learning rate."""
        schedule = optax.warmup_cosine_decay_schedule(
            self.learning_rate / 25, self.learning_rate, max(1, round(self.warmup * steps)), max(2, steps)
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.add_decayed_weights(self.weight_decay, mask=self._decayed),
            optax.sgd(schedule, momentum=self.momentum, nesterov=True),
        )

    def _decayed(self, params: PyTree) -> PyTree:
        """Which arrays are decayed value by value."""

        def is_decayed(path: tuple[Any, ...], values: Array) -> bool:
            in_product = self.decay_products and any(getattr(key, "key", None) == "terms" for key in path)
            return values.ndim > 1 and not in_product

        return jax.tree_util.tree_map_with_path(is_decayed, params)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of the history.

    Attributes:
        epoch: from 1.
        loss: mean of the training loss.
        seconds: of this epoch.
        accuracy: on the validation data, in percent; None without, or without labels.
        validation_loss: the objective on the validation images, where it needs no labels.
    """

    epoch: int
    loss: float
    seconds: float
    accuracy: float | None = None
    validation_loss: float | None = None

    @property
    def score(self) -> float | None:
        """What the best epoch is chosen by, larger is better; None without validation."""
        return _score(self.accuracy, self.validation_loss)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The network after its best epoch (the last of finite loss where there was no validation), and the history.

    `best` is 0, and the network the one that was given, where no epoch made it better on the validation data. A run
    whose loss is no longer finite ends there, with a warning.
    """

    model: nnx.Module
    history: tuple[Epoch, ...]
    best: int


def train(
    model: nnx.Module,
    x: Shaped[np.ndarray | Array, "examples ..."],
    y: Int[np.ndarray | Array, " labels"] | None = None,
    recipe: Recipe = Recipe(),
    *,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    teacher: nnx.Module | None = None,
    validation: Any = None,
    patience: int | None = None,
    checkpoint_dir: str | PathLike[str] | None = None,
    prepare: Prepare = lambda x: x,
    progress: Callable[[Epoch], None] | None = None,
    call: Call = forward,
) -> Trained:
    """Train the Params of a network; everything else but running statistics stays as it is.

    Args:
        model: any NNX network (one that gives logits, for labels); it is not changed.
        x: images as the augmentation wants them, uint8 or float; `prepare` makes the network's input of them.
        y: labels, for an objective that needs them.
        recipe: how.
        objective: what is minimised, in place of the recipe's cross entropy.
        optimizer: in place of the recipe's.
        teacher: network whose answers are imitated as well, in evaluation mode.
        validation: (x, y), x unprepared; the network with the best accuracy on it is returned, of those after each
            epoch and the one that is given. Images alone for an objective without labels: the lowest loss.
        patience: stop after so many epochs without a better one; needs validation.
        checkpoint_dir: a folder that is written after every epoch; a run that finds its own checkpoint there goes on,
            and ends with the weights that it would have had, uninterrupted.
        prepare: per batch, on the device: normalisation, say. Pass the same function each time.
        progress: called after every epoch.
        call: how the networks are called.

    Raises:
        ValueError: labels that do not fit, a teacher that is missing, patience without validation, a checkpoint of
            another run or network.
    """
    objective = objective or recipe.objective()
    _check(x, y, objective, teacher, validation, patience)
    own = nnx.clone(model)
    own.train() if objective.training_mode else own.eval()
    graphdef, params, moving, fixed = nnx.split(own, nnx.Param, MOVING, ...)
    batch = min(recipe.batch_size, len(x))
    per_epoch = len(x) // batch
    transform = optimizer or recipe.optimizer(recipe.epochs * per_epoch)
    taught_def, taught = (None, None) if teacher is None else nnx.split(_evaluating(teacher))
    augment, in_one_call = recipe.augment is not None, runs_in_loops(own)
    loop = Loop(graphdef, taught_def, objective, augment, transform, prepare, call, in_one_call)
    # A step donates what it is given, and a clone shares its arrays with the model.
    params, moving = jax.tree.map(jnp.copy, (params, moving))
    carry = Carry(params, moving, transform.init(params), jax.random.key(recipe.seed))
    decay = ProductDecay(recipe.weight_decay) if recipe.decay_products and optimizer is None else None
    inputs = Inputs(jnp.asarray(x), jnp.asarray(y) if objective.needs_labels else None, taught, fixed, decay)
    given = None if validation is None else _score(**_validate(loop, carry, inputs, validation, batch))
    history: list[Epoch] = []
    best: tuple[int, Any] = (0, jax.tree.map(jnp.copy, (params, moving)))
    store = None
    if checkpoint_dir is not None:
        identity = _identity(
            model, recipe, objective, (x, y, validation), None if optimizer is None else carry.optimizer
        )
        store = Checkpoints(checkpoint_dir, identity, _sizes(model, teacher))
    if store is not None and (found := store.latest({"carry": carry, "best": best[1]})) is not None:
        carry, history = found["carry"], [Epoch(**line) for line in found["history"]]
        best = (_best_epoch(history, given), found["best"])
    while len(history) < recipe.epochs and not _is_over(history, best[0], patience):
        start, number = time.perf_counter(), len(history) + 1
        order = np.random.default_rng((recipe.seed, number)).permutation(len(x))[: per_epoch * batch]
        losses = []
        for part in np.array_split(order.reshape(per_epoch, batch), max(1, per_epoch // _STEPS_PER_CALL)):
            carry, values = loop.steps(inputs, carry, part)
            losses.append(values)
        loss = float(jnp.mean(jnp.concatenate(losses)))
        scores = {} if validation is None else _validate(loop, carry, inputs, validation, batch)
        history.append(Epoch(epoch=number, loss=loss, seconds=time.perf_counter() - start, **scores))
        if _best_epoch(history, given) == number:
            best = (number, jax.tree.map(jnp.copy, carry[:2]))
        if store is not None:
            lines = [asdict(line) for line in history]
            store.save(number, {"carry": carry, "best": best[1]}, lines)
        if progress is not None:
            progress(history[-1])
    if history and not np.isfinite(history[-1].loss):
        warnings.warn(
            f"training diverged in epoch {len(history)}; the network is that of epoch {best[0]}: lower the learning "
            "rate, or clip gradients",
            stacklevel=2,
        )
    new = nnx.merge(graphdef, *best[1], fixed)
    new.eval()
    return Trained(model=new, history=tuple(history), best=best[0])


def _check(x: Any, y: Any, objective: Objective, teacher: Any, validation: Any, patience: int | None) -> None:
    if objective.needs_labels and (np.shape(y) != (len(x),) or not np.issubdtype(np.asarray(y).dtype, np.integer)):
        raise ValueError(
            f"y: {np.asarray(y).dtype} of shape {np.shape(y)}; give one integer label for each of the {len(x)} examples"
        )
    if objective.needs_teacher and teacher is None:
        raise ValueError(f"teacher: None; {type(objective).__name__} imitates a network, give it")
    if not objective.needs_labels and isinstance(validation, tuple):
        raise ValueError(f"validation: a tuple; {type(objective).__name__} needs no labels, give the images alone")
    if patience is not None and validation is None:
        raise ValueError(f"patience: {patience} epochs without a better accuracy; that needs validation data")


def _evaluating(model: nnx.Module) -> nnx.Module:
    copy = nnx.clone(model)
    copy.eval()
    return copy


def _identity(model: nnx.Module, recipe: Recipe, objective: Objective, data: Any, optimizer: Any) -> dict[str, Any]:
    """What is the same, bit for bit, in every run that goes on from the same checkpoints."""
    state = dict(nnx.to_flat_state(nnx.state(model)))
    whole = {k: np.asarray(v[...]) for k, v in state.items() if jnp.issubdtype(v.dtype, jnp.integer)}
    return {
        "recipe": asdict(recipe),
        "objective": repr(objective),
        "optimizer": str(jax.tree.structure(optimizer)),
        "network": {"/".join(map(str, k)): list(v.shape) for k, v in state.items()},
        "kept columns or codes": fingerprint_of({"/".join(map(str, k)): v for k, v in whole.items()}),
        "data": fingerprint_of(data),
    }


def _sizes(*networks: nnx.Module | None) -> list[float]:
    """Sum and norm of every weight: what was computed on the way here may differ in its last bits."""
    states = [nnx.state(network, nnx.Param) for network in networks if network is not None]
    weights = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(states)]
    return [float(f(w)) for w in weights for f in (np.sum, np.linalg.norm)]


def _score(accuracy: float | None = None, validation_loss: float | None = None) -> float | None:
    if validation_loss is None:
        return accuracy
    return -validation_loss if np.isfinite(validation_loss) else -np.inf


def _best_epoch(history: list[Epoch], given: float | None) -> int:
    """The epoch of the best validation, the earliest of equals; the last without validation.

    0 if none was finite, or if what was given has a better score than all of them.
    """
    finite = [line for line in history if np.isfinite(line.loss)]
    if not finite or given is None:
        return len(finite)
    scores = [given if line.score is None else line.score for line in finite]
    return 0 if max(scores) < given else finite[int(np.argmax(scores))].epoch


def _is_over(history: list[Epoch], best: int, patience: int | None) -> bool:
    """Whether the weights are lost, or patience is."""
    if history and not np.isfinite(history[-1].loss):
        return True
    # The first epoch counts as a start: rates rise in it, and networks are rarely better after it.
    return patience is not None and len(history) - max(best, 1) >= patience


def _validate(loop: Loop, carry: Carry, inputs: Inputs, validation: Any, batch: int) -> dict[str, float]:
    """Accuracy on (x, y), or the objective on x, where it needs no labels."""
    if loop.objective.needs_labels:
        model = nnx.merge(loop.graphdef, *jax.tree.map(jnp.copy, carry[:2]), inputs.fixed)
        x, y = validation
        return {"accuracy": accuracy(model, np.asarray(loop.prepare(jnp.asarray(x))), y, call=loop.call)}
    parts = [validation[i : i + batch] for i in range(0, len(validation), batch)]
    total = sum(len(x) * float(loop.judge(inputs, *carry[:2], jnp.asarray(x))) for x in parts)
    return {"validation_loss": total / len(validation)}
