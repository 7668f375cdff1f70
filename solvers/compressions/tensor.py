"""Tucker-2 and CP of a convolution's matrix, which is a tensor: outputs, places of the window, input channels."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from solvers import tensor, tensor_terms
from solvers.compressions.base import FLOAT_BITS, Compression, Theta, is_smaller
from solvers.compressions.bits import Bits, Reader, write_floats
from solvers.compressions.checks import check_count, is_whole
from solvers.tensor import CpOptions, Factors
from solvers.terms import MatrixShape, Term


class TuckerFactors(NamedTuple):
    """`outer core inner'`, the bases orthonormal.

    Attributes:
        outer: (n, r_out).
        core: (r_out, places, r_in).
        inner: (c_in, r_in).
    """

    outer: Float[Array, "n r_out"]
    core: Float[Array, "r_out places r_in"]
    inner: Float[Array, "c_in r_in"]


class _TensorForm(Compression):
    """Forms that are some arrays of float32 values, of shapes that follow from the layer's."""

    window: tuple[int, ...]

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`."""
        if target.ndim != 2 or len(layers) != 1:
            raise ValueError(
                f"{self.word} needs one convolution, not a vector of {len(layers)} layers; give view='matrix', or Each"
            )
        bound = replace(self, window=layers[0].window)  # pyright: ignore[reportArgumentType]
        return Compression.bind(bound, target, layers)

    def _cube(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(Outputs, places, input channels)."""
        places = prod(self.window)
        if places < 2:
            raise ValueError(f"window: {self.window} has one place; use LowRank")
        if shape[1] % places:
            raise ValueError(f"window: {self.window} does not fit {shape[1]} columns")
        return shape[0], places, shape[1] // places

    def _shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Of theta's arrays, for a matrix of this shape."""
        raise NotImplementedError

    def bits(self, theta: Theta) -> int:
        """All values."""
        return FLOAT_BITS * sum(part.size for part in theta)

    def encode(self, theta: Theta) -> Bits:
        """One factor after the other."""
        return np.concatenate([write_floats(part) for part in theta])

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Theta:
        """See `Compression.decode`."""
        return tuple(jnp.asarray(reader.floats(prod(own)).reshape(own)) for own in self._shapes(shape))

    def _term(self, theta: Theta) -> Term:
        raise NotImplementedError

    def terms(self, theta: Theta, shape: MatrixShape) -> tuple[Term, ...] | None:
        """The chain of small convolutions."""
        term = self._term(theta)
        return (term,) if is_smaller((term,), shape) else None


@dataclass(frozen=True)
class Tucker2(_TensorForm):
    """The Tucker-2 form of given ranks nearest by orthogonal iteration: r_in channels, the window, r_out channels, all.

    Kim et al., Compression of deep convolutional neural networks for fast and low power mobile applications (2016).

    Attributes:
        ranks: (outputs, inputs).
        sweeps: of the iteration.
        window: of the convolution, which `bind` finds out.
    """

    word: ClassVar = "tucker2"
    ranks: tuple[int, int]
    sweeps: int = 20
    window: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.ranks) != 2 or not all(is_whole(rank) and rank >= 1 for rank in self.ranks):
            raise ValueError(f"ranks: {self.ranks}; give whole numbers (outputs, inputs), each at least 1")
        check_count("sweeps", self.sweeps)

    def compress(
        self, target: Float[Array, "n p"], mu: Float[ArrayLike, ""], start: TuckerFactors | None = None
    ) -> TuckerFactors:
        """See `Compression.compress`; a start gives the basis of the inputs."""
        cube = target.reshape(self._cube(target.shape))
        n, _, c_in = cube.shape
        if self.ranks[0] > n or self.ranks[1] > c_in:
            raise ValueError(f"ranks: {self.ranks} of a {cube.shape} tensor; give at most ({n}, {c_in})")
        inner = None if start is None else start.inner
        ranks = jnp.asarray(self.ranks, jnp.int32)
        found = tensor.tucker2(cube, ranks, size=self.ranks, sweeps=self.sweeps, inner=inner)
        core = jnp.einsum("osc,oa,cb->asb", cube, found.outer, found.inner, optimize="greedy")
        return TuckerFactors(found.outer, core, found.inner)

    def decompress(self, theta: TuckerFactors) -> Float[Array, "n p"]:
        """The composed matrix."""
        cube = jnp.einsum("oa,asb,cb->osc", *theta, optimize="greedy")
        return cube.reshape(cube.shape[0], -1)

    def _shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        n, places, c_in = self._cube(shape)
        outer, inner = self.ranks
        return [(n, outer), (outer, places, inner), (c_in, inner)]

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> TuckerFactors:
        """See `Compression.decode`."""
        return TuckerFactors(*super().decode(reader, shape))

    def _term(self, theta: TuckerFactors) -> Term:
        outer, core, inner = (np.asarray(part, np.float32) for part in theta)
        return tensor_terms.Tucker2(np.ascontiguousarray(inner.T), core, outer)

    def info(self, theta: TuckerFactors) -> dict[str, Any]:
        """The ranks."""
        return {"ranks": list(self.ranks)}


@dataclass(frozen=True)
class Cp(_TensorForm):
    """A sum of `rank` outer products: to r channels, a filter for each of these, to all outputs.

    Lebedev et al., Speeding-up convolutional neural networks using fine-tuned CP-decomposition (2015).

    Attributes:
        rank: components.
        separable: filters are products of one vector per axis of the window (the 4-way form of 2-D convolutions).
        sweeps: of the alternating least squares, whose end is a local minimum.
        restarts: random starts of the first C step.
        seed: of these.
        window: of the convolution, which `bind` finds out.
    """

    word: ClassVar = "cp"
    rank: int
    separable: bool = False
    sweeps: int = 200
    restarts: int = 2
    seed: int = 0
    window: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank: {self.rank!r}; give a whole number >= 1")
        self._options  # noqa: B018  checks sweeps and restarts

    @property
    def _options(self) -> CpOptions:
        return CpOptions(sweeps=self.sweeps, restarts=self.restarts, seed=self.seed)

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`; a separable form needs a window of height and width."""
        if self.separable and len(layers) == 1 and len(layers[0].window) != 2:
            raise ValueError(f"separable: the window {layers[0].window} has no height and width; leave it out")
        return super().bind(target, layers)

    def _modes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        n, places, c_in = self._cube(shape)
        return (n, *(self.window if self.separable else (places,)), c_in)

    def compress(self, target: Float[Array, "n p"], mu: Float[ArrayLike, ""], start: Factors | None = None) -> Factors:
        """See `Compression.compress`."""
        cube = target.reshape(self._modes(target.shape))
        return tensor.cp(cube, self.rank, size=self.rank, options=self._options, start=start)[0]

    def decompress(self, theta: Factors) -> Float[Array, "n p"]:
        """The composed matrix."""
        return theta[0].T @ tensor.products(theta[1:])

    def _shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(self.rank, size) for size in self._modes(shape)]

    def _term(self, theta: Factors) -> Term:
        last, *filters, first = (np.asarray(part, np.float32) for part in theta)
        outer = np.ascontiguousarray(last.T)
        if self.separable:
            height, width = filters
            return tensor_terms.Cp4(first, height, width, outer)
        return tensor_terms.Cp3(first, filters[0], outer)

    def info(self, theta: Factors) -> dict[str, Any]:
        """The rank."""
        return {"rank": self.rank}
