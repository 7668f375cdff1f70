"""Fewer bits for each value, and nothing else."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from solvers.compressions.base import Compression, rounded
from solvers.compressions.bits import Bits, Reader, write_floats

_BITS = 16


@dataclass(frozen=True)
class Half(Compression):
    """float16 values: theta is the rounded weights."""

    word: ClassVar = "half"

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Float[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """The nearest values."""
        return rounded(target, _BITS)

    def decompress(self, theta: Float[Array, "..."]) -> Float[Array, "..."]:
        """As they are."""
        return theta

    def settle(self, theta: Float[Array, "..."]) -> Float[Array, "..."]:
        """See `Compression.settle`."""
        return rounded(theta, _BITS)

    def bits(self, theta: Float[Array, "..."]) -> int:
        """16 for each weight."""
        return _BITS * theta.size

    def encode(self, theta: Float[Array, "..."]) -> Bits:
        """The values."""
        return write_floats(theta, _BITS)

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """See `Compression.decode`."""
        return jnp.asarray(reader.floats(int(np.prod(shape)), _BITS).reshape(shape))
