"""Several layers in one vector, each compressed by itself: a part of a sum whose other parts see all of the layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from solvers.compressions.base import Compression, Theta
from solvers.compressions.bits import Reader
from solvers.compressions.composite import Composite
from solvers.terms import MatrixShape


@dataclass(frozen=True)
class Each(Composite):
    """The layers of a joint task one by one, as matrices.

    Attributes:
        parts: one form for each layer, in order; or a single one for all of them.
        layers: which `bind` finds out.
    """

    word: ClassVar = "each"
    layers: tuple[MatrixShape, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts: empty; give one form for all layers, or one for each")

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`."""
        parts = self.parts * len(layers) if len(self.parts) == 1 else self.parts
        if len(parts) != len(layers):
            raise ValueError(f"parts: {len(parts)} for {len(layers)} layers; give one for all, or one for each")
        unbound = replace(self, parts=parts, layers=layers)
        slices = zip(parts, unbound._split(target), layers, strict=True)
        return replace(unbound, parts=tuple(part.bind(own, (layer,)) for part, own, layer in slices))

    def _split(self, target: Float[Array, "..."]) -> list[Float[Array, "n p"]]:
        ends = np.cumsum([layer.n * layer.p for layer in self.layers])
        if not self.layers or target.size != ends[-1]:
            raise ValueError(f"layers: {self.layers} are not the {target.size} weights; use it within a joint task")
        pieces = jnp.split(target.reshape(-1), ends[:-1])
        return [piece.reshape(layer.n, layer.p) for piece, layer in zip(pieces, self.layers, strict=True)]

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Sequence[Theta] | None = None
    ) -> tuple[Theta, ...]:
        """See `Compression.compress`."""
        before = [None] * len(self.parts) if start is None else start
        each = zip(self.parts, self._split(target), before, strict=True)
        return tuple(part.compress(own, mu, theta) for part, own, theta in each)

    def decompress(self, theta: tuple[Theta, ...]) -> Float[Array, " weights"]:
        """One layer after the other."""
        return jnp.concatenate([p.decompress(own).reshape(-1) for p, own in zip(self.parts, theta, strict=True)])

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> tuple[Theta, ...]:
        """See `Compression.decode`."""
        pairs = zip(self.parts, self.layers, strict=True)
        return tuple(part.decode(reader, (layer.n, layer.p)) for part, layer in pairs)

    def info(self, theta: tuple[Theta, ...]) -> dict[str, Any]:
        """Of all layers."""
        return {"layers": [part.info(own) for part, own in zip(self.parts, theta, strict=True)]}
