"""Sums of compressed forms, each of which takes what the others leave."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, UInt8

from solvers.compressions.base import Compression, Theta


@dataclass(frozen=True)
class Additive:
    """sum_i Delta_i(theta_i), by turns: each part is the best for the target less the others.

    Idelbayev & Carreira-Perpinan, More general and effective model compression via an additive combination of
    compressions (2021), section 3. With parts whose C step is exact the objective never rises.

    Attributes:
        parts: in the order of the turns, at least two.
        rounds: turns of all parts.
    """

    parts: tuple[Compression, ...]
    rounds: int = 10

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"parts: {len(self.parts)}; give at least two, or use the one by itself")
        if self.rounds < 1:
            raise ValueError(f"rounds: {self.rounds}; give at least 1")

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: tuple[Theta, ...] | None = None
    ) -> tuple[Theta, ...]:
        """See `Compression.compress`; without a start every part begins at zero."""
        thetas: list[Theta] = list(start or [None] * len(self.parts))
        values = [
            jnp.zeros_like(target) if theta is None else part.decompress(theta)
            for part, theta in zip(self.parts, thetas, strict=True)
        ]
        for _ in range(self.rounds):
            for i, part in enumerate(self.parts):
                rest = target - sum((v for j, v in enumerate(values) if j != i), start=jnp.zeros_like(target))
                thetas[i] = part.compress(rest, mu, thetas[i])
                values[i] = part.decompress(thetas[i])
        return tuple(thetas)

    def decompress(self, theta: tuple[Theta, ...]) -> Float[Array, "..."]:
        """The sum."""
        first, *rest = (part.decompress(own) for part, own in zip(self.parts, theta, strict=True))
        return sum(rest, start=first)

    def penalty(self, theta: tuple[Theta, ...]) -> Float[Array, ""]:
        """Of all parts."""
        first, *rest = (part.penalty(own) for part, own in zip(self.parts, theta, strict=True))
        return sum(rest, start=first)

    def bits(self, theta: tuple[Theta, ...]) -> int:
        """Of all parts."""
        return sum(part.bits(own) for part, own in zip(self.parts, theta, strict=True))

    def encode(self, theta: tuple[Theta, ...]) -> UInt8[np.ndarray, " bits"]:
        """One part after the other."""
        return np.concatenate([part.encode(own) for part, own in zip(self.parts, theta, strict=True)])
