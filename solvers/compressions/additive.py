"""Sums of compressed forms, each of which takes what the others leave."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from solvers.compressions.base import Compression, Theta, contest, is_smaller
from solvers.compressions.bits import Reader
from solvers.compressions.checks import check_count
from solvers.compressions.composite import Composite
from solvers.terms import MatrixShape, Term

_RTOL = 1e-6  # a round that lowers the objective by less is the last


@dataclass(frozen=True)
class Additive(Composite):
    """sum_i Delta_i(theta_i), by turns: each part is the best for the target less the others.

    Idelbayev & Carreira-Perpinan, More general and effective model compression via an additive combination of
    compressions (2021), section 3. With parts whose C step is exact the objective never rises.

    Attributes:
        parts: in the order of the turns, at least two.
        rounds: most turns of all parts.
    """

    word: ClassVar = "sum"
    rounds: int = 10

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"parts: {len(self.parts)}; give at least two, or use the one by itself")
        check_count("rounds", self.rounds)

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`."""
        return replace(self, parts=tuple(part.bind(target, layers) for part in self.parts))

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: tuple[Theta, ...] | None = None
    ) -> tuple[Theta, ...]:
        """See `Compression.compress`; without a start every part begins at zero."""
        first = self._round(target, mu, start)

        def goes_on(state: tuple) -> Array:
            _, value, before, rounds = state
            return (rounds < self.rounds) & (value < before * (1 - _RTOL))

        def body(state: tuple) -> tuple:
            thetas, value, _, rounds = state
            new = self._round(target, mu, thetas)
            return new, contest(self, new, target, mu), value, rounds + 1

        value = contest(self, first, target, mu)
        state = first, value, jnp.full_like(value, jnp.inf), jnp.ones((), jnp.int32)
        return lax.while_loop(goes_on, body, state)[0]

    def _round(self, target: Array, mu: Float[ArrayLike, ""], start: tuple[Theta, ...] | None) -> tuple[Theta, ...]:
        """One turn of all parts."""
        thetas: list[Theta] = [None] * len(self.parts) if start is None else list(start)
        values = [
            jnp.zeros_like(target) if theta is None else part.decompress(theta)
            for part, theta in zip(self.parts, thetas, strict=True)
        ]
        for i, part in enumerate(self.parts):
            others = sum((v for j, v in enumerate(values) if j != i), start=jnp.zeros_like(target))
            thetas[i] = part.compress(target - others, mu, thetas[i])
            values[i] = part.decompress(thetas[i])
        return tuple(thetas)

    def decompress(self, theta: tuple[Theta, ...]) -> Float[Array, "..."]:
        """The sum."""
        first, *rest = (part.decompress(own) for part, own in zip(self.parts, theta, strict=True))
        return sum(rest, start=first)

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> tuple[Theta, ...]:
        """See `Compression.decode`."""
        return tuple(part.decode(reader, shape) for part in self.parts)

    def terms(self, theta: tuple[Theta, ...], shape: MatrixShape) -> tuple[Term, ...] | None:
        """Those of all parts, if all have some and they are fewer values than the dense matrix."""
        each = [part.terms(own, shape) for part, own in zip(self.parts, theta, strict=True)]
        found = [own for own in each if own is not None]
        terms = tuple(term for own in found for term in own)
        return terms if len(found) == len(each) and is_smaller(terms, shape) else None

    def term_bits(self, theta: tuple[Theta, ...], shape: MatrixShape) -> tuple[int, ...]:
        """Those of all parts."""
        return sum((part.term_bits(own, shape) for part, own in zip(self.parts, theta, strict=True)), start=())

    def info(self, theta: tuple[Theta, ...]) -> dict[str, Any]:
        """Of all parts."""
        return {"parts": [part.info(own) for part, own in zip(self.parts, theta, strict=True)]}
