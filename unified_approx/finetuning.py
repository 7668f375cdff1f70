"""Training of a compressed network with its structure fixed."""

from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int, Shaped

from unified_approx.evaluate import Call, forward
from unified_approx.pipeline import Result
from unified_approx.training import Epoch, Prepare, Recipe, Trained, train

RECIPE = Recipe(learning_rate=0.01)


def _as_given(x: Array) -> Array:
    return x


def finetune(
    result: Result | nnx.Module,
    x: Shaped[np.ndarray | Array, "examples ..."],
    y: Int[np.ndarray | Array, " labels"],
    recipe: Recipe = RECIPE,
    *,
    original: nnx.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    validation: tuple[Any, Any] | None = None,
    patience: int | None = None,
    checkpoint_dir: str | PathLike[str] | None = None,
    prepare: Prepare = _as_given,
    progress: Callable[[Epoch], None] | None = None,
    call: Call = forward,
) -> Trained:
    """Train the values and factors of a compressed network; which columns are kept, and the ranks, stay as they are.

    Args:
        result: of `compress`, or any network.
        x: training images, uint8 or float, as the augmentation of the recipe wants them.
        y: labels.
        recipe: how.
        original: the network before compression: its answers are imitated too, with weight `recipe.distill`.
        optimizer: any of Optax's in place of the recipe's.
        validation: (x, y) that the best epoch is chosen on. Not the test set.
        patience: stop after so many epochs without a better one.
        checkpoint_dir: folder from which an interrupted run goes on exactly.
        prepare: makes the network's input of a batch, on the device.
        progress: called after every epoch.
        call: how the networks are called.

    Returns:
        The trained network, of the same structure, and the history.

    Raises:
        ValueError: as `train`.
    """
    model = result.model if isinstance(result, Result) else result
    return train(
        model,
        x,
        y,
        recipe,
        optimizer=optimizer,
        teacher=original,
        validation=validation,
        patience=patience,
        checkpoint_dir=checkpoint_dir,
        prepare=prepare,
        progress=progress,
        call=call,
    )
