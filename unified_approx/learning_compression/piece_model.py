"""The quadratic model of one piece: of what its compression sees."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from solvers.taylor import Taylor
from unified_approx.learning_compression.taylor import NetworkTaylor, Part
from unified_approx.pieces import Piece


def part_l_step(part: Part, target: Float[Array, "..."], mu: Float[ArrayLike, ""]) -> Float[Array, "..."]:
    """The L step of one parameter, in its own shape."""
    return part.l_step(target.reshape(part.w.shape), mu).reshape(target.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PieceModel:
    """A `solvers.taylor.Quadratic`.

    Attributes:
        parts: of its parameters, in its order.
        piece: static.
    """

    parts: tuple[Part, ...]
    piece: Piece = field(metadata={"static": True})

    def value(self, w: Float[Array, "..."]) -> Float[Array, ""]:
        """See `Quadratic.value`."""
        own = self.piece.unpack(w)
        pairs = zip(self.parts, self.piece.paths, strict=True)
        return sum((part.value(own[path].reshape(part.w.shape)) for part, path in pairs), start=jnp.zeros((), w.dtype))

    def l_step(self, target: Float[Array, "..."], mu: Float[ArrayLike, ""]) -> Float[Array, "..."]:
        """See `Quadratic.l_step`."""
        own = self.piece.unpack(target)
        pairs = zip(self.parts, self.piece.paths, strict=True)
        return self.piece.pack({path: part_l_step(part, own[path], mu) for part, path in pairs})

    @property
    def w(self) -> Float[Array, "..."]:
        """The trained weights as the compression sees them."""
        return _packed(self.piece, self.parts, "w")


def _packed(piece: Piece, parts: Sequence[Part], name: str) -> Float[Array, "..."]:
    shapes = zip(parts, piece.paths, piece.shapes, strict=True)
    return piece.pack({path: getattr(part, name).reshape(shape) for part, path, shape in shapes})


def quadratic_of(
    piece: Piece, taylor: NetworkTaylor, damping: float, *, gradient: bool
) -> tuple[Taylor | PieceModel, Float[Array, ""]]:
    """The model of what a compression sees, and its unit of curvature.

    The unit is the mean curvature; without any ||g|| / ||w||; 1 if there is no gradient either.

    Args:
        piece: of the network that the model was made for.
        taylor: of the network.
        damping: added to the curvature, in this unit.
        gradient: whether to keep the gradient.

    Returns:
        A `Taylor` if all parts are diagonal.
    """
    parts = tuple(taylor.parts[path] for path in piece.paths)
    if all(isinstance(part, Taylor) for part in parts):
        return _diagonal(piece, parts, damping, gradient)
    used, unit = _prepared(parts, damping, gradient)
    return PieceModel(used, piece), unit


def minimum_of(part: Part, damping: float, *, gradient: bool) -> Float[Array, "..."]:
    """Where a parameter by itself is best, damped in the same unit."""
    return _prepared((part,), damping, gradient)[0][0].minimum()


@partial(jax.jit, static_argnums=(0, 3))
def _diagonal(
    piece: Piece, parts: tuple[Taylor, ...], damping: Float[ArrayLike, ""], gradient: bool
) -> tuple[Taylor, Float[Array, ""]]:
    used, unit = _prepared(parts, damping, gradient)
    return Taylor(*(_packed(piece, used, name) for name in ("w", "g", "h"))), unit


@partial(jax.jit, static_argnums=2)
def _prepared(
    parts: tuple[Part, ...], damping: Float[ArrayLike, ""], gradient: bool
) -> tuple[tuple[Part, ...], Float[Array, ""]]:
    used = parts if gradient else tuple(part.without_gradient() for part in parts)
    unit = _unit(used)
    return tuple(part.damped(damping * unit) for part in used), unit


def _unit(parts: Sequence[Part]) -> Float[Array, ""]:
    curvature = sum(jnp.sum(part.curvature()) for part in parts) / sum(part.w.size for part in parts)
    g, w = (jnp.sqrt(jnp.asarray(sum(jnp.sum(getattr(part, name) ** 2) for part in parts))) for name in ("g", "w"))
    slope = jnp.where((g > 0) & (w > 0), g / jnp.where(w > 0, w, 1), 1)
    return jnp.where(curvature > 0, curvature, slope)
