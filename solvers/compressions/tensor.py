"""Tucker-2 and CP of a convolution's matrix, which is a tensor: outputs, places of the window, input channels."""

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, UInt8

from solvers import tensor
from solvers.compressions.base import FLOAT_BITS, write_floats
from solvers.tensor import CpOptions, Factors


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


def _check_window(window: tuple[int, ...]) -> None:
    if prod(window) < 2:
        raise ValueError(f"window: {window} has one place; use LowRank")


def _check_columns(window: tuple[int, ...], columns: int) -> None:
    if columns % prod(window):
        raise ValueError(f"window: {window} does not fit {columns} columns")


class _Floats:
    """Forms that are some arrays of float32 values."""

    def penalty(self, theta: Any) -> Float[Array, ""]:
        """0."""
        return jnp.zeros((), theta[0].dtype)

    def bits(self, theta: Any) -> int:
        """All values."""
        return FLOAT_BITS * sum(part.size for part in theta)

    def encode(self, theta: Any) -> UInt8[np.ndarray, " bits"]:
        """One factor after the other."""
        return np.concatenate([write_floats(part) for part in theta])


@dataclass(frozen=True)
class Tucker2(_Floats):
    """The Tucker-2 form of given ranks nearest by orthogonal iteration: r_in channels, the window, r_out channels, all.

    Attributes:
        ranks: (outputs, inputs).
        window: of the convolution.
        sweeps: of the iteration.
    """

    ranks: tuple[int, int]
    window: tuple[int, ...]
    sweeps: int = 20

    def __post_init__(self) -> None:
        _check_window(self.window)
        if len(self.ranks) != 2 or min(self.ranks) < 1:
            raise ValueError(f"ranks: {self.ranks}; give (outputs, inputs), each at least 1")

    def compress(
        self, target: Float[Array, "n p"], mu: Float[ArrayLike, ""], start: TuckerFactors | None = None
    ) -> TuckerFactors:
        """See `Compression.compress`; a start gives the basis of the inputs."""
        n, p = target.shape
        _check_columns(self.window, p)
        cube = target.reshape(n, prod(self.window), -1)
        if self.ranks[0] > n or self.ranks[1] > cube.shape[2]:
            raise ValueError(f"ranks: {self.ranks} of a {cube.shape} tensor; give at most ({n}, {cube.shape[2]})")
        inner = None if start is None else start.inner
        ranks = jnp.asarray(self.ranks, jnp.int32)
        found = tensor.tucker2(cube, ranks, size=self.ranks, sweeps=self.sweeps, inner=inner)
        core = jnp.einsum("osc,oa,cb->asb", cube, found.outer, found.inner, optimize="greedy")
        return TuckerFactors(found.outer, core, found.inner)

    def decompress(self, theta: TuckerFactors) -> Float[Array, "n p"]:
        """The composed matrix."""
        cube = jnp.einsum("oa,asb,cb->osc", *theta, optimize="greedy")
        return cube.reshape(cube.shape[0], -1)


@dataclass(frozen=True)
class Cp(_Floats):
    """A sum of `rank` outer products: to r channels, a filter for each of these, to all outputs.

    Attributes:
        rank: components.
        window: of the convolution.
        separable: filters are products of one vector per axis of the window (the 4-way form of 2-D convolutions).
        options: of the alternating least squares, whose end is a local minimum.
    """

    rank: int
    window: tuple[int, ...]
    separable: bool = False
    options: CpOptions = CpOptions()

    def __post_init__(self) -> None:
        _check_window(self.window)
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank: {self.rank!r}; give a whole number >= 1")

    def compress(self, target: Float[Array, "n p"], mu: Float[ArrayLike, ""], start: Factors | None = None) -> Factors:
        """See `Compression.compress`."""
        n, p = target.shape
        _check_columns(self.window, p)
        filters = self.window if self.separable else (prod(self.window),)
        return tensor.cp(target.reshape(n, *filters, -1), self.rank, size=self.rank, options=self.options, start=start)[
            0
        ]

    def decompress(self, theta: Factors) -> Float[Array, "n p"]:
        """The composed matrix."""
        return theta[0].T @ tensor.products(theta[1:])
