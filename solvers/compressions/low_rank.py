"""Low rank: of given rank, or of the rank that pays best."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from solvers.compressions.base import FLOAT_BITS, write_floats

SCHEMES = ("rows", "spatial")


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


@dataclass(frozen=True)
class Reshaping:
    """Which matrix a layer is taken for.

    Attributes:
        scheme: "rows": (n, kh kw c), a kh x kw convolution to r channels, then 1 x 1. "spatial": (n kh, kw c), a 1 x kw
            convolution to r channels, then kh x 1.
        window: (kh, kw), which "spatial" needs.
    """

    scheme: str = "rows"
    window: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme: {self.scheme!r} is unknown; choose {' or '.join(SCHEMES)}")
        if self.scheme == "spatial" and len(self.window) != 2:
            raise ValueError(f"window: {self.window}; scheme='spatial' needs the (kh, kw) of a convolution")

    @property
    def _rows(self) -> int:
        return self.window[0] if self.scheme == "spatial" else 1

    def apply(self, w: Float[Array, "n p"]) -> Float[Array, "rows columns"]:
        """The (n, p) matrix of the layer in the other shape."""
        n, p = w.shape
        if p % self._rows:
            raise ValueError(f"window: {self.window} does not fit {p} columns")
        return w.reshape(n * self._rows, p // self._rows)

    def undo(self, w: Float[Array, "rows columns"]) -> Float[Array, "n p"]:
        """Back."""
        rows, columns = w.shape
        return w.reshape(rows // self._rows, columns * self._rows)


def _svd(w: Float[Array, "rows columns"]) -> tuple[Array, Array, Array]:
    """(u, s, v) from the eigenvectors of the smaller Gram matrix would lose half of the digits: a true SVD."""
    return jnp.linalg.svd(w, full_matrices=False)


class _Factored:
    value_bits: int
    reshaping: Reshaping

    def decompress(self, theta: Factors) -> Float[Array, "n p"]:
        """U v in the layer's shape."""
        return self.reshaping.undo(theta.u @ theta.v)

    def bits(self, theta: Factors) -> int:
        """Values of both factors."""
        return self.value_bits * int(theta.rank) * (theta.u.shape[0] + theta.v.shape[1])

    def encode(self, theta: Factors) -> UInt8[np.ndarray, " bits"]:
        """U, then v."""
        r = int(theta.rank)
        parts = (np.asarray(theta.u)[:, :r], np.asarray(theta.v)[:r])
        return np.concatenate([write_floats(part, self.value_bits) for part in parts])

    def _factors(self, w: Float[Array, "rows columns"], rank: Int[ArrayLike, ""], largest: int) -> Factors:
        u, s, v = _svd(w)
        used = jnp.arange(largest) < rank
        root = jnp.where(used, jnp.sqrt(s[:largest]), 0)
        factors = (u[:, :largest] * root[None, :], root[:, None] * v[:largest])
        if self.value_bits == 16:
            factors = tuple(f.astype(jnp.float16).astype(w.dtype) for f in factors)
        return Factors(*factors, jnp.asarray(rank, jnp.int32))


def _check_bits(value_bits: int) -> None:
    if value_bits not in (16, 32):
        raise ValueError(f"value_bits: {value_bits!r}; give 16 or 32")


@dataclass(frozen=True)
class LowRank(_Factored):
    """The nearest matrix of rank `rank` at most, by the singular value decomposition (Eckart & Young, 1936).

    Attributes:
        rank: r.
        reshaping: of the layer into a matrix.
        value_bits: 32, or 16 for float16 factors.
    """

    rank: int
    reshaping: Reshaping = Reshaping()
    value_bits: int = FLOAT_BITS

    def __post_init__(self) -> None:
        _check_bits(self.value_bits)
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(f"rank: {self.rank!r}; give a whole number >= 0")

    def compress(self, target: Float[Array, "n p"], mu: Float[ArrayLike, ""], start: Factors | None = None) -> Factors:
        """See `Compression.compress`."""
        w = self.reshaping.apply(target)
        if self.rank > min(w.shape):
            raise ValueError(f"rank: {self.rank} of a {w.shape} matrix; give at most {min(w.shape)}")
        return self._factors(w, self.rank, self.rank)

    def penalty(self, theta: Factors) -> Float[Array, ""]:
        """0."""
        return jnp.zeros((), theta.u.dtype)


@dataclass(frozen=True)
class RankSelection(_Factored):
    """The rank is chosen too: min over r of alpha r (rows + columns) cost + mu/2 ||w - rank-r part||^2, exactly.

    Idelbayev & Carreira-Perpinan, Low-rank compression of neural nets: learning the rank of each layer (2020), eq. 8.

    Attributes:
        alpha: price of a stored value, or of a multiply-add.
        cost: multiply-adds per stored value (the output positions), or 1 for storage.
        normalize: divide the squared error by ||w||^2.
        reshaping: of the layer into a matrix.
        value_bits: 32, or 16 for float16 factors.
    """

    alpha: float
    cost: float = 1.0
    normalize: bool = False
    reshaping: Reshaping = Reshaping()
    value_bits: int = FLOAT_BITS

    def __post_init__(self) -> None:
        _check_bits(self.value_bits)
        for name in ("alpha", "cost"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)!r}; give a number >= 0")

    def compress(self, target: Float[Array, "n p"], mu: Float[ArrayLike, ""], start: Factors | None = None) -> Factors:
        """See `Compression.compress`; at mu = 0 the rank is full, as the first step of the algorithm wants it."""
        w = self.reshaping.apply(target)
        energy = jnp.linalg.svd(w, compute_uv=False) ** 2
        total = jnp.sum(energy)
        left = jnp.concatenate([total[None], total - jnp.cumsum(energy)])
        scale = jnp.where(total > 0, total, 1) if self.normalize else jnp.ones_like(total)
        ranks = jnp.arange(len(left)).astype(w.dtype)
        price = self.alpha * self.cost * ranks * (w.shape[0] + w.shape[1])
        weight = jnp.asarray(mu, w.dtype)
        best = jnp.argmin(price + weight / 2 * jnp.maximum(left, 0) / scale)
        return self._factors(w, jnp.where(weight > 0, best, min(w.shape)), min(w.shape))

    def penalty(self, theta: Factors) -> Float[Array, ""]:
        """Alpha times the cost of the rank."""
        return self.alpha * self.cost * theta.rank.astype(theta.u.dtype) * (theta.u.shape[0] + theta.v.shape[1])
