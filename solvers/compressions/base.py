"""What a C step is: the best compressed form of given weights, which knows nothing of the loss."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, ArrayLike, Float, UInt8

Theta = Any
"""The parameters of a compressed form: a pytree of arrays."""

FLOAT_BITS = 32


@runtime_checkable
class Compression(Protocol):
    """A frozen, hashable dataclass: static under jit.

    `compress` minimises penalty(theta) + mu/2 ||target - decompress(theta)||^2; forms without a penalty do not look at
    mu. Carreira-Perpinan, Model compression as constrained optimization, with application to neural nets (2017), eq. 5.
    """

    def compress(self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Theta | None = None) -> Theta:
        """The C step. `start` is an earlier theta for targets of the same shape, where the minimiser is a local one."""
        ...

    def decompress(self, theta: Theta) -> Float[Array, "..."]:
        """The weights, shaped as the target was."""
        ...

    def penalty(self, theta: Theta) -> Float[Array, ""]:
        """What the form itself costs in the objective; 0 for a constraint."""
        ...

    def bits(self, theta: Theta) -> int:
        """Bits that `encode` needs, by formula."""
        ...

    def encode(self, theta: Theta) -> UInt8[np.ndarray, " bits"]:
        """Theta as a stream of bits, one to an entry: what `bits` counts, no more."""
        ...


def width_of(count: int) -> int:
    """Bits that tell `count` symbols apart."""
    return max(0, int(count - 1).bit_length())


def write_bits(values: Sequence[int] | np.ndarray, width: int) -> UInt8[np.ndarray, " bits"]:
    """Unsigned integers of equal width, most significant bit first."""
    numbers = np.asarray(values, np.uint64).reshape(-1, 1)
    shifts = np.arange(width, dtype=np.uint64)[::-1]
    return ((numbers >> shifts) & np.uint64(1)).astype(np.uint8).reshape(-1)


def write_floats(values: ArrayLike, bits: int = FLOAT_BITS) -> UInt8[np.ndarray, " bits"]:
    """Floating-point values of 32 or 16 bits."""
    kinds = {32: (np.float32, np.uint32), 16: (np.float16, np.uint16)}
    real, whole = kinds[bits]
    return write_bits(np.asarray(values).astype(real).reshape(-1).view(whole), bits)


def gap_symbols(kept: np.ndarray, width: int) -> np.ndarray:
    """Distances between kept positions as symbols of `width` bits; the largest symbol says: so many, and go on.

    Han et al., Deep Compression (2016), section 2.
    """
    escape = 2**width - 1
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    escapes = gaps // escape
    symbols = np.full(int(np.sum(escapes + 1)), escape, np.int64)
    symbols[np.cumsum(escapes + 1) - 1] = gaps - escapes * escape
    return symbols


def gap_width(kept: np.ndarray) -> tuple[int, int]:
    """(Width of the gap symbols with the fewest bits, those bits)."""
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    sizes = {width: width * int(np.sum(gaps // (2**width - 1) + 1)) for width in range(2, 33)}
    best = min(sizes, key=lambda width: sizes[width])
    return best, sizes[best]
