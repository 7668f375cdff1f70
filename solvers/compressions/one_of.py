"""The best of several forms."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from solvers.compressions.base import Compression, Theta, contest
from solvers.compressions.bits import Bits, Reader, width_of, write_bits
from solvers.terms import MatrixShape, Term


class Choice(NamedTuple):
    """Which form, and the theta of each.

    Attributes:
        which: number of the form.
        thetas: of all of them.
    """

    which: Int[Array, ""]
    thetas: tuple[Theta, ...]


@dataclass(frozen=True)
class OneOf(Compression):
    """The form of lowest penalty + mu/2 ||gap||^2, of equals the first: exact if all of them are.

    At mu = 0, where constraints are all equal, the distance counts as at mu = 1.

    Attributes:
        parts: the forms.
    """

    word: ClassVar = "one_of"
    parts: tuple[Compression, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"parts: {len(self.parts)}; give at least two to choose from")

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`."""
        return replace(self, parts=tuple(part.bind(target, layers) for part in self.parts))

    def compress(self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Choice | None = None) -> Choice:
        """See `Compression.compress`."""
        before = [None] * len(self.parts) if start is None else start.thetas
        pairs = zip(self.parts, before, strict=True)
        thetas = tuple(part.compress(target, mu, theta) for part, theta in pairs)
        values = [contest(part, theta, target, mu) for part, theta in zip(self.parts, thetas, strict=True)]
        return Choice(jnp.argmin(jnp.stack(values)).astype(jnp.int32), thetas)

    def decompress(self, theta: Choice) -> Float[Array, "..."]:
        """Of the chosen form."""
        values = [part.decompress(own) for part, own in zip(self.parts, theta.thetas, strict=True)]
        return jnp.stack(values)[theta.which]

    def penalty(self, theta: Choice) -> Float[Array, ""]:
        """Of the chosen form."""
        values = [part.penalty(own) for part, own in zip(self.parts, theta.thetas, strict=True)]
        return jnp.stack(values)[theta.which]

    def _chosen(self, theta: Choice) -> tuple[Compression, Theta]:
        return self.parts[int(theta.which)], theta.thetas[int(theta.which)]

    def bits(self, theta: Choice) -> int:
        """The number of the form, and its bits."""
        part, own = self._chosen(theta)
        return width_of(len(self.parts)) + part.bits(own)

    def encode(self, theta: Choice) -> Bits:
        """The number of the form, and its stream."""
        part, own = self._chosen(theta)
        return np.concatenate([write_bits([int(theta.which)], width_of(len(self.parts))), part.encode(own)])

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Choice:
        """See `Compression.decode`; the forms that were not chosen get the weights of the chosen one."""
        which = int(reader.integers(1, width_of(len(self.parts)))[0])
        own = self.parts[which].decode(reader, shape)
        weights = self.parts[which].decompress(own)
        others = [own if i == which else part.compress(weights, 1.0) for i, part in enumerate(self.parts)]
        return Choice(jnp.asarray(which, jnp.int32), tuple(others))

    def terms(self, theta: Choice, shape: MatrixShape) -> tuple[Term, ...] | None:
        """Of the chosen form."""
        part, own = self._chosen(theta)
        return part.terms(own, shape)

    def term_bits(self, theta: Choice, shape: MatrixShape) -> tuple[int, ...]:
        """Of the chosen form."""
        part, own = self._chosen(theta)
        return part.term_bits(own, shape)

    def settle(self, theta: Choice) -> Choice:
        """See `Compression.settle`."""
        pairs = zip(self.parts, theta.thetas, strict=True)
        return Choice(theta.which, tuple(part.settle(own) for part, own in pairs))

    def info(self, theta: Choice) -> dict[str, Any]:
        """Of the chosen form, and which it is."""
        part, own = self._chosen(theta)
        return {"which": int(theta.which), **part.info(own)}
