"""Training of a compressed network on: what is stored of it is what is trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Shaped

from solvers.compressions.base import Theta
from unified_approx.assemble import get, put
from unified_approx.finetuning import RECIPE
from unified_approx.learning_compression.result import LcResult, make_result
from unified_approx.pieces import Piece, parameters_of
from unified_approx.training import Recipe, train


class _Derived(nnx.Variable):
    """A parameter that is computed from theta."""


class _Fixed(nnx.Variable):
    """The part of theta that is not trained: codes, signs, ranks."""


class Decompressed(nnx.Module):
    """A network whose compressed parameters are computed from theta in every call; theta's real values are trained.

    Codebooks' values, factors, scales and the weights that are kept move. Which weight has which code, ranks, and what
    is exactly zero, stay.
    """

    def __init__(self, model: nnx.Module, pieces: tuple[Piece, ...], thetas: tuple[Theta, ...]):
        """Of a network and what is stored of it."""
        self.network = nnx.clone(model)
        for path, value in parameters_of(model).items():
            if any(path in piece.paths for piece in pieces):
                put(self.network, path, _Derived(value))
        leaves, self.structure = jax.tree.flatten(thetas)
        self.leaves = nnx.List([_variable(leaf) for leaf in leaves])
        self.pieces = pieces

    @property
    def thetas(self) -> tuple[Theta, ...]:
        """As they are now. A zero's gradient is zero, so that it stays one."""
        values = [jnp.where(v[...] != 0, v[...], 0) if isinstance(v, nnx.Param) else v[...] for v in self.leaves]
        return jax.tree.unflatten(self.structure, values)

    def __call__(self, *inputs: Any) -> Any:
        """The network's outputs."""
        for piece, theta in zip(self.pieces, self.thetas, strict=True):
            for path, value in piece.decompress(theta).items():
                get(self.network, path)[...] = value
        return self.network(*inputs)

    def plain(self) -> nnx.Module:
        """The network with ordinary parameters, whatever their values where they are compressed."""
        model = nnx.clone(self.network)
        for path in (path for piece in self.pieces for path in piece.paths):
            put(model, path, nnx.Param(get(model, path)[...]))
        return model


def _variable(leaf: Array) -> nnx.Variable:
    return nnx.Param(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else _Fixed(leaf)


def finetune_compressed(
    result: LcResult,
    x: Shaped[np.ndarray | Array, "examples ..."],
    y: Int[np.ndarray | Array, " labels"],
    recipe: Recipe = RECIPE,
    **arguments: Any,
) -> LcResult:
    """Train what is stored of a network, and its free parameters; codes, zeros and ranks stay as they are.

    Args:
        result: of `lc`.
        x: training images, as the augmentation of the recipe wants them.
        y: labels.
        recipe: how.
        **arguments: of `unified_approx.train`: a teacher, validation, checkpoints, progress and so on.

    Returns:
        The same compression with other values; the history is that of `result`.

    Raises:
        ValueError: as `train`.
    """
    done = train(Decompressed(result.model, result.pieces, result.thetas), x, y, recipe, **arguments)
    module: Any = done.model
    settled = zip(result.pieces, module.thetas, strict=True)
    thetas = tuple(piece.compression.settle(theta) for piece, theta in settled)
    return make_result(module.plain(), result.pieces, thetas, result.history, result.best)
