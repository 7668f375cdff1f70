"""Training of a compressed network with its structure fixed."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int, Shaped

from unified_approx.assemble import Identity, modules
from unified_approx.calling import Call, forward
from unified_approx.layers import Factored
from unified_approx.loop import Prepare
from unified_approx.norms import fold_batch_norms, insert_batch_norms
from unified_approx.objectives import OutputMatch
from unified_approx.pipeline import Result
from unified_approx.rules import check_pattern
from unified_approx.sites import Path, path_name
from unified_approx.training import Epoch, Recipe, Trained, train
from unified_approx.training_forms import as_before, for_training

_EXAMPLES = 256  # that the statistics of batch norms start from
RECIPE = Recipe(learning_rate=0.01)
MATCH_RECIPE = Recipe(learning_rate=0.01, weight_decay=0.0)  # decay would shrink what the objective does not see


def _as_given(x: Array) -> Array:
    return x


def finetune(
    result: Result | nnx.Module,
    x: Shaped[np.ndarray | Array, "examples ..."],
    y: Int[np.ndarray | Array, " labels"],
    recipe: Recipe = RECIPE,
    *,
    original: nnx.Module | None = None,
    batch_norms: bool = False,
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
        batch_norms: put those that compression folded back while training, and fold them again at the end.
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
    network, norms = _network(result), ()
    example = prepare(jnp.asarray(x[:_EXAMPLES]))
    model = for_training(network, example, call=call)
    if batch_norms:
        model, norms = insert_batch_norms(model, example, call)
    done = train(
        model,
        x,
        y,
        recipe,
        optimizer=optimizer,
        teacher=None if original is None else for_training(original, example, call=call),
        validation=validation,
        patience=patience,
        checkpoint_dir=checkpoint_dir,
        prepare=prepare,
        progress=progress,
        call=call,
    )
    trained = fold_batch_norms(done.model, norms, example, call) if batch_norms else done.model
    return replace(done, model=as_before(trained, network))


def match_outputs(
    result: Result | nnx.Module,
    original: nnx.Module,
    x: Shaped[np.ndarray | Array, "examples ..."],
    recipe: Recipe = MATCH_RECIPE,
    *,
    blocks: Sequence[str] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    validation: Any = None,
    patience: int | None = None,
    checkpoint_dir: str | PathLike[str] | None = None,
    prepare: Prepare = _as_given,
    progress: Callable[[Epoch], None] | None = None,
    call: Call = forward,
) -> Trained:
    """Train a compressed network to answer like the original, without labels, its structure fixed.

    `compress` matches each layer's response; this matches what comes of all of them. Minimises T^2 KL(original ||
    compressed) of the outputs for logits (T is `recipe.temperature`), ||original - compressed||^2 / ||original||^2 for
    any other output, or the latter for the outputs of blocks. Batch norms that are left run as in use.

    Args:
        result: of `compress`, or any network.
        original: the network before compression.
        x: images, uint8 or float, as the augmentation of the recipe wants them.
        recipe: how; `distill` and `label_smoothing` have no meaning here.
        blocks: regular expressions for the whole paths of modules, such as `blocks/[0-9]+`, whose outputs are
            matched in place of the network's; layers after the last of them do not change.
        optimizer: any of Optax's in place of the recipe's.
        validation: other images; the epoch that matches best on them is returned.
        patience: stop after so many epochs without a better one.
        checkpoint_dir: folder from which an interrupted run goes on exactly.
        prepare: makes the networks' input of a batch, on the device.
        progress: called after every epoch.
        call: how the networks are called.

    Returns:
        The trained network, of the same structure, and the history.

    Raises:
        ValueError: a pattern that is no regular expression or matches no module, outputs of the two networks that
            cannot be compared, or what `train` raises.
    """
    model = _network(result)
    paths = () if blocks is None else _blocks(blocks, model, original)
    objective = OutputMatch(temperature=recipe.temperature, blocks=paths)
    example = prepare(jnp.asarray(x[:1]))
    _check_comparable(objective, model, original, example, call)
    done = train(
        for_training(model, example, call=call),
        x,
        recipe=recipe,
        objective=objective,
        optimizer=optimizer,
        teacher=for_training(original, example, call=call),
        validation=validation,
        patience=patience,
        checkpoint_dir=checkpoint_dir,
        prepare=prepare,
        progress=progress,
        call=call,
    )
    return replace(done, model=as_before(done.model, model))


def _network(result: Result | nnx.Module) -> nnx.Module:
    return result.model if isinstance(result, Result) else result


def _blocks(patterns: Sequence[str], model: nnx.Module, original: nnx.Module) -> tuple[Path, ...]:
    """Paths, in the network's order, of the modules that the patterns name."""
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"blocks: {patterns!r}; give a list of patterns, or None for the network's output")
    own = modules(model)
    both = {path_name(path): path for path in modules(original) if path and callable(own.get(path))}
    chosen: set[str] = set()
    for pattern in patterns:
        check_pattern("blocks", pattern)
        found = {name for name in both if re.fullmatch(pattern, name)}
        if not found:
            raise ValueError(f"blocks: {pattern!r} matches no module of both networks; there are: {', '.join(both)}")
        chosen |= found
    folded = any(isinstance(module, Identity) for module in own.values())
    layers = [name for name in chosen if isinstance(own[both[name]], Factored)]
    if folded and layers:
        raise ValueError(
            f"blocks: {min(layers)!r} is a compressed layer, which may hold the batch norm after it, and then gives "
            "another output than the original layer; name that batch norm, or the block around both"
        )
    return tuple(path for name, path in both.items() if name in chosen)


def _check_comparable(objective: OutputMatch, model: nnx.Module, original: nnx.Module, x: Array, call: Call) -> None:
    for path in objective.blocks:
        ours, theirs = (_shapes(OutputMatch(blocks=(path,)), network, x, call) for network in (model, original))
        if ours != theirs or not ours:
            raise ValueError(
                f"blocks: {path_name(path)!r} gives {ours}, the original's {theirs}; name blocks that give arrays, and "
                "that kept all their channels (those that nothing reads were removed)"
            )
    if objective.blocks:
        return
    ours, theirs = (_shapes(objective, network, x, call) for network in (model, original))
    if ours != theirs or not ours:
        raise ValueError(
            f"original: outputs of shapes {theirs}, the compressed network's are {ours}; give the network that was "
            "compressed"
        )


def _shapes(objective: OutputMatch, network: nnx.Module, x: Array, call: Call) -> list[tuple[int, ...]]:
    graphdef, state = nnx.split(network)
    try:
        seen = jax.eval_shape(lambda state, x: objective.observe(call, nnx.merge(graphdef, state), x), state, x)
    except (jax.errors.UnexpectedTracerError, TypeError) as error:
        if not objective.blocks:
            raise
        names = ", ".join(map(path_name, objective.blocks))
        raise ValueError(
            f"blocks: the output of {names} cannot be taken, most likely because the network runs it inside a "
            f"transformation of its own (jit, remat, scan); name the module around it ({error})"
        ) from error
    return [leaf.shape for leaf in seen]
