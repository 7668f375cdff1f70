"""Fewer bits for each value, and nothing else."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from solvers.compressions.base import Compression, rounded
from solvers.compressions.bits import Bits, Reader, write_floats
from solvers.compressions.checks import check_fits
from solvers.terms import MatrixShape


@dataclass(frozen=True)
class Half(Compression):
    """float16 values: theta is the rounded weights."""

    word: ClassVar = "half"
    value_bits: ClassVar[int] = 16

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`; refuses weights that float16 has no numbers for."""
        check_fits(self.value_bits, target)
        return super().bind(target, layers)

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Float[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """The nearest values."""
        return rounded(target, self.value_bits)

    def decompress(self, theta: Float[Array, "..."]) -> Float[Array, "..."]:
        """As they are."""
        return theta

    def settle(self, theta: Float[Array, "..."]) -> Float[Array, "..."]:
        """See `Compression.settle`."""
        return rounded(theta, self.value_bits)

    def bits(self, theta: Float[Array, "..."]) -> int:
        """16 for each weight."""
        return self.value_bits * theta.size

    def encode(self, theta: Float[Array, "..."]) -> Bits:
        """The values."""
        return write_floats(theta, self.value_bits)

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """See `Compression.decode`."""
        return jnp.asarray(reader.floats(int(np.prod(shape)), self.value_bits).reshape(shape))
