"""What a C step is: the best compressed form of given weights, which knows nothing of the loss."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from solvers.compressions.bits import FLOAT_BITS, Bits, Reader
from solvers.compressions.checks import FLOAT16_LARGEST
from solvers.terms import MatrixShape, Term

Theta = Any
"""The parameters of a compressed form: a pytree of arrays."""

__all__ = ["FLOAT_BITS", "Compression", "Theta", "objective"]


class Compression(ABC):
    """A frozen, hashable dataclass: static under jit. A new one inherits from this class.

    `compress` minimises penalty(theta) + mu/2 ||target - decompress(theta)||^2; forms without a penalty do not look at
    mu. Carreira-Perpinan, Model compression as constrained optimization, with application to neural nets (2017), eq. 5.

    The structure, shapes and dtypes of theta depend on those of the target alone.

    Attributes:
        word: what the form is called on the command line; None: nothing.
    """

    word: ClassVar[str | None] = None

    @abstractmethod
    def compress(self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Theta | None = None) -> Theta:
        """The C step, which can be traced. `start` is an earlier theta for targets of the same shape, from where a
        minimiser that is a local one is looked for.
        """

    @abstractmethod
    def decompress(self, theta: Theta) -> Float[Array, "..."]:
        """The weights, shaped as the target was."""

    @abstractmethod
    def bits(self, theta: Theta) -> int:
        """Bits that `encode` needs, by formula."""

    @abstractmethod
    def encode(self, theta: Theta) -> Bits:
        """Theta as a stream of bits: what `bits` counts, no more."""

    @abstractmethod
    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Theta:
        """The theta of a target of that shape, in float32, from what `encode` wrote; reads that and no more."""

    def penalty(self, theta: Theta) -> Float[Array, ""]:
        """What the form itself costs in the objective; 0 for a constraint."""
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(theta) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return jnp.zeros((), dtypes[0] if dtypes else jnp.float32)

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> "Compression":
        """The form for weights like these, with what it must know of their layers.

        Args:
            target: the weights before the first step: the (n, p) matrix of a layer, or a vector of several.
            layers: what the target is made of, in order.

        Raises:
            ValueError: a size that is out of range for these weights.
        """
        jax.eval_shape(self.compress, target, 0.0)
        return self

    def terms(self, theta: Theta, shape: MatrixShape) -> tuple[Term, ...] | None:
        """Theta as pieces of a layer that is smaller than the dense one; None where there is no such layer."""
        return None

    def term_bits(self, theta: Theta, shape: MatrixShape) -> tuple[int, ...]:
        """Bits of a value of each of the `terms`: 32, or 16 where the values are those of float16."""
        return (FLOAT_BITS,) * len(self.terms(theta, shape) or ())

    def settle(self, theta: Theta) -> Theta:
        """Theta as it can be stored, after training has moved its values: rounded to fewer bits, where it is so."""
        return theta

    def info(self, theta: Theta) -> dict[str, Any]:
        """What a history should tell of theta, in JSON's types."""
        return {}


def objective(
    compression: Compression, theta: Theta, target: Float[Array, "..."], mu: Float[ArrayLike, ""]
) -> Float[Array, ""]:
    """penalty(theta) + mu/2 ||target - decompress(theta)||^2: what a C step minimises."""
    gap = target - compression.decompress(theta)
    return compression.penalty(theta) + jnp.asarray(mu, gap.dtype) / 2 * jnp.sum(gap * gap)


def contest(
    compression: Compression, theta: Theta, target: Float[Array, "..."], mu: Float[ArrayLike, ""]
) -> Float[Array, ""]:
    """What candidates are compared by: the objective, and at mu = 0 the penalty plus half the squared distance.

    At mu = 0 the objective of every constraint is 0 and tells nothing; direct compression wants the nearest.
    """
    return objective(compression, theta, target, jnp.where(jnp.asarray(mu) > 0, mu, 1))


def is_smaller(terms: tuple[Term, ...], shape: MatrixShape) -> bool:
    """Whether the terms hold fewer values than the dense matrix."""
    return sum(term.num_params for term in terms) < shape.n * shape.p


def rounded(values: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """The values as they are when stored in that many bits: the nearest of those, which are finite."""
    if bits != 16:
        return values
    return jnp.clip(values, -FLOAT16_LARGEST, FLOAT16_LARGEST).astype(jnp.float16).astype(values.dtype)
