"""Pruning: single weights, groups of a matrix, N of every M."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, UInt8

from solvers.compressions.base import FLOAT_BITS, gap_symbols, gap_width, width_of, write_bits, write_floats
from solvers.compressions.quantization import AdaptiveCodebook
from solvers.prox import COLUMNS, Grouping, project_groups

Values = Float[Array, "..."]


class _Pruned:
    """Theta is the pruned weights themselves, in the target's shape."""

    value_bits: int = FLOAT_BITS

    def decompress(self, theta: Values) -> Values:
        """As they are."""
        return theta

    def penalty(self, theta: Values) -> Float[Array, ""]:
        """0."""
        return jnp.zeros((), theta.dtype)

    def _values(self, theta: Values) -> UInt8[np.ndarray, " bits"]:
        values = np.asarray(theta).reshape(-1)
        return write_floats(values[values != 0], self.value_bits)

    def bits(self, theta: Values) -> int:
        """Gaps between the weights that are not zero, and these."""
        kept = np.asarray(theta).reshape(-1) != 0
        return gap_width(kept)[1] + self.value_bits * int(kept.sum())

    def encode(self, theta: Values) -> UInt8[np.ndarray, " bits"]:
        """Gaps, then values."""
        kept = np.asarray(theta).reshape(-1) != 0
        width = gap_width(kept)[0]
        return np.concatenate([write_bits(gap_symbols(kept, width), width), self._values(theta)])


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: {value!r} is not a number of weights; give a whole number >= 0")


def _check_weight(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}: {value!r}; give a number >= 0")


def _largest(target: Values, kappa: int) -> Values:
    flat = target.reshape(-1)
    order = jnp.argsort(-jnp.abs(flat), stable=True)[:kappa]
    return jnp.zeros_like(flat).at[order].set(flat[order]).reshape(target.shape)


@dataclass(frozen=True)
class PruneL0(_Pruned):
    """At most `kappa` weights: the largest, of equals the first.

    Attributes:
        kappa: how many stay.
        precision: bits of a stored value: 32, 16 (float16), or 1 to 8: a codebook of 2^precision values.
    """

    kappa: int
    precision: int = FLOAT_BITS

    def __post_init__(self) -> None:
        _check_count("kappa", self.kappa)
        if self.precision not in (*range(1, 9), 16, 32):
            raise ValueError(f"precision: {self.precision!r} bits; give 32, 16, or 1 to 8 for a codebook")

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Values | None = None) -> Values:
        """See `Compression.compress`."""
        if self.kappa > target.size:
            raise ValueError(f"kappa: {self.kappa} of {target.size} weights; give at most that many")
        pruned = _largest(target, self.kappa)
        if self.precision == FLOAT_BITS:
            return pruned
        if self.precision == 16:
            return pruned.astype(jnp.float16).astype(target.dtype)
        order = jnp.argsort(-jnp.abs(target.reshape(-1)), stable=True)[: self.kappa]
        book = AdaptiveCodebook(min(2**self.precision, max(1, self.kappa)))
        shared = book.decompress(book.compress(target.reshape(-1)[order], mu))
        return jnp.zeros_like(target.reshape(-1)).at[order].set(shared).reshape(target.shape)

    @property
    def value_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of one value."""
        return self.precision

    def bits(self, theta: Values) -> int:
        """As `_Pruned`, with the codebook."""
        codebook = 0 if self.precision >= 16 else FLOAT_BITS * self._codebook(theta).size
        return super().bits(theta) + codebook

    def _codebook(self, theta: Values) -> np.ndarray:
        return np.unique(np.asarray(theta)[np.asarray(theta) != 0])

    def _values(self, theta: Values) -> UInt8[np.ndarray, " bits"]:
        if self.precision >= 16:
            return super()._values(theta)
        values, book = np.asarray(theta).reshape(-1), self._codebook(theta)
        codes = np.searchsorted(book, values[values != 0])
        return np.concatenate([write_bits(codes, self.precision), write_floats(book)])


@dataclass(frozen=True)
class PruneL1(_Pruned):
    """sum |w| <= kappa: the exact Euclidean projection, Duchi et al. (2008), figure 1.

    Attributes:
        kappa: radius of the ball.
    """

    kappa: float

    def __post_init__(self) -> None:
        _check_weight("kappa", self.kappa)

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Values | None = None) -> Values:
        """See `Compression.compress`."""
        size = jnp.sort(jnp.abs(target.reshape(-1)))[::-1]
        counts = jnp.arange(1, size.size + 1)
        levels = (jnp.cumsum(size) - self.kappa) / counts.astype(size.dtype)
        last = jnp.max(jnp.where(size > levels, counts, 1)) - 1
        inside = jnp.sum(size) <= self.kappa
        return _shrink(target, jnp.where(inside, 0, jnp.maximum(levels[last], 0)))


def _shrink(target: Values, level: Float[ArrayLike, ""]) -> Values:
    return jnp.sign(target) * jnp.maximum(jnp.abs(target) - level, 0)


@dataclass(frozen=True)
class PenaltyL0(_Pruned):
    """alpha times the number of weights: those of at least sqrt(2 alpha / mu) stay.

    Attributes:
        alpha: the price of a weight.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_weight("alpha", self.alpha)

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Values | None = None) -> Values:
        """See `Compression.compress`; nothing stays at mu = 0 and alpha > 0."""
        return jnp.where(jnp.asarray(mu, target.dtype) * target * target > 2 * self.alpha, target, 0)

    def penalty(self, theta: Values) -> Float[Array, ""]:
        """Alpha times the weights that are not zero."""
        return self.alpha * jnp.sum(theta != 0).astype(theta.dtype)


@dataclass(frozen=True)
class PenaltyL1(_Pruned):
    """alpha sum |w|: soft thresholding by alpha / mu.

    Attributes:
        alpha: weight of the penalty.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_weight("alpha", self.alpha)

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Values | None = None) -> Values:
        """See `Compression.compress`; nothing stays at mu = 0 and alpha > 0."""
        mu = jnp.asarray(mu, target.dtype)
        level = self.alpha / jnp.where(mu > 0, mu, 1)
        return jnp.where((mu > 0) | (self.alpha == 0), _shrink(target, level), 0)

    def penalty(self, theta: Values) -> Float[Array, ""]:
        """Alpha times the sum of the absolute values."""
        return self.alpha * jnp.sum(jnp.abs(theta))


@dataclass(frozen=True)
class PruneGroups(_Pruned):
    """At most `kappa` columns, rows or input channels of a matrix: those of largest norm.

    Attributes:
        kappa: how many groups stay.
        grouping: `solvers.prox.COLUMNS`, `ROWS` or `channels(c_in)`.
    """

    kappa: int
    grouping: Grouping = COLUMNS

    def __post_init__(self) -> None:
        _check_count("kappa", self.kappa)

    def compress(
        self, target: Float[Array, "n p"], mu: Float[ArrayLike, ""], start: Values | None = None
    ) -> Float[Array, "n p"]:
        """See `Compression.compress`."""
        count = self.grouping.count(target.shape)
        if self.kappa > count:
            raise ValueError(f"kappa: {self.kappa} of {count} {self.grouping.name}; give at most that many")
        return project_groups(target, self.kappa, self.grouping)

    def bits(self, theta: Float[Array, "n p"]) -> int:
        """A bit for every group, and all values of those that stay."""
        kept = np.asarray(self.grouping.norms(jnp.asarray(theta))) > 0
        return kept.size + FLOAT_BITS * int(kept.sum()) * (theta.size // kept.size)

    def encode(self, theta: Float[Array, "n p"]) -> UInt8[np.ndarray, " bits"]:
        """The bits of the groups, then the values."""
        kept = self.grouping.norms(jnp.asarray(theta)) > 0
        inside = np.asarray(self.grouping.expand(kept, theta.shape))
        return np.concatenate([write_bits(np.asarray(kept), 1), write_floats(np.asarray(theta)[inside])])


@dataclass(frozen=True)
class PruneNofM(_Pruned):
    """`n` of every `m` neighbours along the last axis: the largest, as sparse tensor cores take them.

    Attributes:
        n: weights that stay.
        m: neighbours.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"n, m: {self.n} of {self.m}; give 0 < n <= m, for example 2 of 4")

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Values | None = None) -> Values:
        """See `Compression.compress`."""
        if target.shape[-1] % self.m:
            raise ValueError(f"m: {self.m} does not divide the last axis of {target.shape}")
        blocks = target.reshape(-1, self.m)
        order = jnp.argsort(-jnp.abs(blocks), axis=1, stable=True)
        rank = jnp.argsort(order, axis=1)
        return jnp.where(rank < self.n, blocks, 0).reshape(target.shape)

    def bits(self, theta: Values) -> int:
        """For each block n places within it and n values."""
        return theta.size // self.m * self.n * (width_of(self.m) + FLOAT_BITS)

    def encode(self, theta: Values) -> UInt8[np.ndarray, " bits"]:
        """All places, then all values."""
        blocks = np.asarray(theta).reshape(-1, self.m)
        places = np.sort(np.argsort(blocks == 0, axis=1, kind="stable")[:, : self.n], axis=1)
        values = np.take_along_axis(blocks, places, axis=1)
        return np.concatenate([write_bits(places, width_of(self.m)), write_floats(values)])
