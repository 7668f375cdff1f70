"""The network with smaller layers, where compressed layers can be run as such."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from solvers.compressions import Half
from solvers.compressions.base import Theta
from unified_approx.assemble import get, homes, put
from unified_approx.layers import Factored, factored_class, geometry_of
from unified_approx.pieces import Piece, parameters_of
from unified_approx.sites import path_name


def rebuilt(model: nnx.Module, pieces: Sequence[Piece], thetas: Sequence[Theta]) -> tuple[nnx.Module, tuple[int, ...]]:
    """A copy of the network in which every piece that has terms is a factored layer.

    Returns:
        The network, and the numbers of the pieces that stayed as they were.
    """
    new, left = nnx.clone(model), []
    for i, (piece, theta) in enumerate(zip(pieces, thetas, strict=True)):
        layer = _factored(new, piece, theta)
        if layer is None:
            left.append(i)
            continue
        for home in homes(new, piece.paths[0][:-1]):
            new = put(new, home, layer)
    return new, tuple(left)


def halved(model: nnx.Module, piece: Piece, theta: Theta) -> list[tuple[Piece, Theta]]:
    """The values of a rebuilt layer that are float16 in truth, as pieces of their own."""
    bits = piece.compression.term_bits(theta, piece.layers[0])
    roots = [(*piece.paths[0][:-1], "terms", i) for i, size in enumerate(bits) if size == 16]
    return [
        (Piece(path_name(path), Half(), (path,), (value.shape,), (False,), False), value.reshape(-1))
        for path, value in parameters_of(model).items()
        if path[: len(piece.paths[0]) + 1] in roots
    ]


def _factored(model: nnx.Module, piece: Piece, theta: Theta) -> Factored | None:
    """The smaller layer, or None where there is none."""
    if not (piece.matrix and piece.kernels[0]):
        return None
    terms = piece.compression.terms(theta, piece.layers[0])
    old: Any = get(model, piece.paths[0][:-1])
    if terms is None or not is_plain(old):
        return None
    bias = None if old.bias is None else jnp.asarray(old.bias[...])
    return factored_class(geometry_of(old)).from_terms(terms, bias, geometry_of(old), dtype=old.dtype)


def is_plain(layer: nnx.Conv | nnx.Linear) -> bool:
    """Whether factored layers can do what this one does: no groups, no masks, no unusual padding."""
    try:
        geometry_of(layer)
    except ValueError:
        return False
    return True
