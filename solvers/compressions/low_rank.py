"""Low rank: of given rank, of the rank that pays best, or by the nuclear norm."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from solvers import terms as stored
from solvers.compressions.base import FLOAT_BITS, Compression, is_smaller, rounded
from solvers.compressions.bits import Bits, Reader, width_of, write_bits, write_floats
from solvers.compressions.checks import check_fits, check_float_format, check_matrix, check_weight
from solvers.compressions.reshaping import Reshaping, check_scheme
from solvers.terms import MatrixShape, Term


class Factors(NamedTuple):
    """u v, the singular values' square roots in both; columns of u and rows of v beyond the rank are zero.

    Attributes:
        u: (rows, largest rank).
        v: (largest rank, columns).
        rank: how many are used.
    """

    u: Float[Array, "n k"]
    v: Float[Array, "k p"]
    rank: Int[Array, ""]


class FactoredForm(Compression):
    """Theta is `Factors` of the matrix in the shape of its scheme."""

    scheme: str
    window: tuple[int, ...]
    value_bits: int

    @property
    def reshaping(self) -> Reshaping:
        """Of the layer's matrix."""
        return Reshaping(self.scheme, self.window)

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`."""
        check_matrix("low rank", target, layers)
        check_fits(self.value_bits, target)
        bound = replace(self, window=layers[0].window)  # pyright: ignore[reportArgumentType]
        return Compression.bind(bound, target, layers)

    def decompress(self, theta: Factors) -> Float[Array, "n p"]:
        """U v in the layer's shape."""
        return self.reshaping.undo(product(theta))

    def _rank_width(self, theta: Factors) -> int:
        """Bits that say how large the rank is."""
        return width_of(min(theta.u.shape[0], theta.v.shape[1]) + 1)

    def bits(self, theta: Factors) -> int:
        """The rank, and the values of both factors."""
        return self._rank_width(theta) + self.value_bits * int(theta.rank) * (theta.u.shape[0] + theta.v.shape[1])

    def encode(self, theta: Factors) -> Bits:
        """The rank, u, v."""
        r = int(theta.rank)
        parts = (np.asarray(theta.u)[:, :r], np.asarray(theta.v)[:r])
        streams = [write_floats(part, self.value_bits) for part in parts]
        return np.concatenate([write_bits([r], self._rank_width(theta)), *streams])

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Factors:
        """See `Compression.decode`."""
        rows, columns = self.reshaping.shape(shape)
        rank = int(reader.integers(1, width_of(min(rows, columns) + 1))[0])
        return self._decode(reader, rank, rows, columns)

    def _decode(self, reader: Reader, rank: int, rows: int, columns: int) -> Factors:
        largest = self._largest(rows, columns)
        u, v = np.zeros((rows, largest), np.float32), np.zeros((largest, columns), np.float32)
        u[:, :rank] = reader.floats(rows * rank, self.value_bits).reshape(rows, rank)
        v[:rank] = reader.floats(columns * rank, self.value_bits).reshape(rank, columns)
        return Factors(jnp.asarray(u), jnp.asarray(v), jnp.asarray(rank, jnp.int32))

    def _largest(self, rows: int, columns: int) -> int:
        """The rank that theta has room for."""
        return min(rows, columns)

    def terms(self, theta: Factors, shape: MatrixShape) -> tuple[Term, ...] | None:
        """One pair of factors."""
        r = int(theta.rank)
        u, v = np.asarray(theta.u, np.float32)[:, :r], np.asarray(theta.v, np.float32)[:r]
        if self.reshaping.is_spatial:
            term: Term = stored.Spatial(v, u.reshape(shape.n, -1, r))
        else:
            term = stored.LowRank(u, v, np.arange(shape.p, dtype=np.int32))
        return (term,) if is_smaller((term,), shape) else None

    def term_bits(self, theta: Factors, shape: MatrixShape) -> tuple[int, ...]:
        """See `Compression.term_bits`."""
        return (self.value_bits,) * len(self.terms(theta, shape) or ())

    def settle(self, theta: Factors) -> Factors:
        """See `Compression.settle`."""
        return Factors(rounded(theta.u, self.value_bits), rounded(theta.v, self.value_bits), theta.rank)

    def info(self, theta: Factors) -> dict[str, Any]:
        """The rank."""
        return {"rank": int(theta.rank)}


def factors(
    svd: tuple[Array, Array, Array], sizes: Float[Array, " s"], rank: Int[ArrayLike, ""], largest: int, value_bits: int
) -> Factors:
    """The first `rank` singular directions with the given sizes in place of the singular values."""
    u, _, v = svd
    root = jnp.where(jnp.arange(largest) < rank, jnp.sqrt(sizes[:largest]), 0)
    pair = u[:, :largest] * root[None, :], root[:, None] * v[:largest]
    return Factors(rounded(pair[0], value_bits), rounded(pair[1], value_bits), jnp.asarray(rank, jnp.int32))


def product(theta: Factors) -> Float[Array, "rows columns"]:
    """U v."""
    return jnp.matmul(theta.u, theta.v, precision="highest")


def svd_of(w: Float[Array, "rows columns"]) -> tuple[Array, Array, Array]:
    """(u, s, v): eigenvectors of the smaller Gram matrix would be faster, and lose half of the digits."""
    u, s, v = lax.linalg.svd(w, full_matrices=False)
    return u, s, v


@dataclass(frozen=True)
class LowRank(FactoredForm):
    """The nearest matrix of rank `rank` at most, by the singular value decomposition (Eckart & Young, 1936).

    Attributes:
        rank: r.
        scheme: of the layer as a matrix, see `Reshaping`; "auto": the one with fewer values.
        window: (kh, kw) of a convolution, which `bind` finds out.
        value_bits: 32, or 16 for float16 factors.
    """

    word: ClassVar = "low_rank"
    rank: int
    scheme: str = "rows"
    window: tuple[int, ...] = ()
    value_bits: int = FLOAT_BITS

    def __post_init__(self) -> None:
        check_scheme(self.scheme)
        check_float_format("value_bits", self.value_bits)
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(f"rank: {self.rank!r}; give a whole number >= 0")

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`; settles the scheme."""
        chosen = replace(self, scheme=_cheaper(layers[0])) if self.scheme == "auto" else self
        return FactoredForm.bind(chosen, target, layers)

    def compress(self, target: Float[Array, "n p"], mu: Float[ArrayLike, ""], start: Factors | None = None) -> Factors:
        """See `Compression.compress`."""
        w = self.reshaping.apply(target)
        if self.rank > min(w.shape):
            raise ValueError(f"rank: {self.rank} of a {w.shape} matrix; give at most {min(w.shape)}")
        svd = svd_of(w)
        return factors(svd, svd[1], self.rank, self.rank, self.value_bits)

    def _largest(self, rows: int, columns: int) -> int:
        return self.rank


def _cheaper(layer: MatrixShape) -> str:
    """The scheme with fewer values per rank."""
    if len(layer.window) != 2:
        return "rows"
    spatial = Reshaping("spatial", layer.window)
    return "spatial" if sum(spatial.shape((layer.n, layer.p))) < layer.n + layer.p else "rows"


@dataclass(frozen=True)
class PenaltyNuclear(FactoredForm):
    """alpha ||w||_*, the sum of the singular values: the low-rank part of the paper's split.

    Attributes:
        alpha: weight of the norm.
        scheme: of the layer as a matrix, see `Reshaping`.
        window: (kh, kw) of a convolution, which `bind` finds out.
        value_bits: 32, or 16 for float16 factors.
    """

    word: ClassVar = "penalty_nuclear"
    alpha: float
    scheme: str = "rows"
    window: tuple[int, ...] = ()
    value_bits: int = FLOAT_BITS

    def __post_init__(self) -> None:
        check_scheme(self.scheme, auto=False)
        check_float_format("value_bits", self.value_bits)
        check_weight("alpha", self.alpha)

    def compress(self, target: Float[Array, "n p"], mu: Float[ArrayLike, ""], start: Factors | None = None) -> Factors:
        """See `Compression.compress`: singular values less alpha / mu. Nothing stays at mu = 0 and alpha > 0."""
        svd = svd_of(self.reshaping.apply(target))
        mu = jnp.asarray(mu, target.dtype)
        shrunk = jnp.maximum(svd[1] - self.alpha / jnp.where(mu > 0, mu, 1), 0)
        shrunk = jnp.where((mu > 0) | (self.alpha == 0), shrunk, 0)
        return factors(svd, shrunk, jnp.sum(shrunk > 0), len(shrunk), self.value_bits)

    def penalty(self, theta: Factors) -> Float[Array, ""]:
        """Alpha times the sum of the singular values; those of u and of v are their square roots."""
        return self.alpha / 2 * (jnp.sum(theta.u**2) + jnp.sum(theta.v**2))
