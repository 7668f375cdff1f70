"""What forms of several parts have in common: each part has its own share of theta, stored one after the other."""

from abc import ABC
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float

from solvers.compressions.base import Compression, Theta
from solvers.compressions.bits import Bits


@dataclass(frozen=True)
class Composite(Compression, ABC):
    """Parts whose penalties and bits add up.

    Attributes:
        parts: in order.
    """

    parts: tuple[Compression, ...]

    def penalty(self, theta: tuple[Theta, ...]) -> Float[Array, ""]:
        """Of all parts."""
        first, *rest = (part.penalty(own) for part, own in zip(self.parts, theta, strict=True))
        return sum(rest, start=first)

    def bits(self, theta: tuple[Theta, ...]) -> int:
        """Of all parts."""
        return sum(part.bits(own) for part, own in zip(self.parts, theta, strict=True))

    def encode(self, theta: tuple[Theta, ...]) -> Bits:
        """One part after the other."""
        return np.concatenate([part.encode(own) for part, own in zip(self.parts, theta, strict=True)])

    def settle(self, theta: tuple[Theta, ...]) -> tuple[Theta, ...]:
        """See `Compression.settle`."""
        return tuple(part.settle(own) for part, own in zip(self.parts, theta, strict=True))
