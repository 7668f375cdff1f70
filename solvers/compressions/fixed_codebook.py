"""Quantization to values that are given, and so are not stored."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from solvers.compressions.base import Compression
from solvers.compressions.bits import Bits, Reader, width_of, write_bits
from solvers.compressions.checks import check_count, check_exponents, check_numbers
from solvers.compressions.quantization import nearest


@dataclass(frozen=True)
class FixedCodebook(Compression):
    """Given values, the same for every network: theta is the codes. See `binary`, `fixed_point`, `powers_of_two`.

    Attributes:
        values: increasing.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        check_numbers("values", self.values)
        if len(self.values) < 2 or list(self.values) != sorted(set(self.values)):
            raise ValueError(f"values: {self.values} are not at least two increasing numbers")

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Int[Array, "..."] | None = None
    ) -> Int[Array, "..."]:
        """The nearest value."""
        return nearest(target, jnp.asarray(self.values, target.dtype))

    def decompress(self, theta: Int[Array, "..."]) -> Float[Array, "..."]:
        """Each weight's value, in float32."""
        return jnp.asarray(self.values, jnp.float32)[theta]

    def bits(self, theta: Int[Array, "..."]) -> int:
        """ceil(log2 k) for each weight."""
        return width_of(len(self.values)) * theta.size

    def encode(self, theta: Int[Array, "..."]) -> Bits:
        """The codes."""
        return write_bits(np.asarray(theta), width_of(len(self.values)))

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Int[Array, "..."]:
        """See `Compression.decode`."""
        codes = reader.integers(int(np.prod(shape)), width_of(len(self.values)))
        return jnp.asarray(codes.reshape(shape), jnp.int32)


def binary() -> FixedCodebook:
    """{-1, 1}."""
    return FixedCodebook((-1.0, 1.0))


def fixed_point(bits: int, fraction: int) -> FixedCodebook:
    """Signed numbers of `bits` bits, `fraction` of them behind the point: multiples of 2^-fraction."""
    check_count("bits", bits)
    check_exponents(fraction=fraction)
    if bits > 16:
        raise ValueError(f"bits: {bits!r}; give 1 to 16")
    half = 2 ** (bits - 1)
    return FixedCodebook(tuple(i * 2.0**-fraction for i in range(-half, half)))


def powers_of_two(largest: int, smallest: int) -> FixedCodebook:
    """0 and +-2^i for the exponents between `smallest` and `largest`."""
    check_exponents(largest=largest, smallest=smallest)
    if smallest > largest:
        raise ValueError(f"smallest, largest: {smallest} > {largest}; give the exponents in order")
    sizes = [2.0**i for i in range(smallest, largest + 1)]
    return FixedCodebook((*(-s for s in reversed(sizes)), 0.0, *sizes))
