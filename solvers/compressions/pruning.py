"""Pruning of single weights."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from solvers.compressions.base import FLOAT_BITS, Compression, rounded
from solvers.compressions.bits import (
    Bits,
    Reader,
    position_bits,
    read_positions,
    width_of,
    write_bits,
    write_floats,
    write_positions,
)
from solvers.compressions.checks import (
    check_amount,
    check_choice,
    check_distinct,
    check_fits,
    check_float_format,
    check_k,
    check_weight,
    count_of,
)
from solvers.compressions.k_means import INITS, means_from, means_from_scratch
from solvers.compressions.quantization import Codebook, nearest
from solvers.prox import soft_threshold
from solvers.terms import MatrixShape

Values = Float[Array, "..."]


def largest(target: Values, count: int) -> Bool[Array, "..."]:
    """Which are the `count` weights of largest size, of equals the first.

    The size of the last of them is found bit by bit: a sort would take twenty times as long.
    """
    size = jnp.abs(target)
    whole = jnp.int32 if size.dtype.itemsize == 4 else jnp.int64
    size = lax.bitcast_convert_type(size, whole)  # of floats >= 0, in the same order
    top = jnp.iinfo(whole).bits - 2

    def narrow(i: Array, least: Array) -> Array:
        higher = least | (jnp.ones((), whole) << (top - i).astype(whole))
        return jnp.where(jnp.sum(size >= higher) >= count, higher, least)

    least = lax.fori_loop(0, top + 1, narrow, jnp.zeros((), whole))
    above, equal = size > least, size == least
    left = count - jnp.sum(above)
    first = jnp.cumsum(equal.reshape(-1)).reshape(equal.shape) <= left
    return above | (equal & first)


class _Pruned(Compression):
    """Theta is the pruned weights themselves, in the target's shape; its zeros are not stored."""

    _value_bits: ClassVar[int] = FLOAT_BITS

    def decompress(self, theta: Values) -> Values:
        """As they are."""
        return theta

    def bits(self, theta: Values) -> int:
        """Gaps between the weights that are not zero, and these."""
        kept = np.asarray(theta).reshape(-1) != 0
        return position_bits(kept) + self._value_bits * int(kept.sum())

    def encode(self, theta: Values) -> Bits:
        """Gaps, then values."""
        values = np.asarray(theta).reshape(-1)
        return np.concatenate([write_positions(values != 0), write_floats(values[values != 0], self._value_bits)])

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Values:
        """See `Compression.decode`."""
        values = np.zeros(int(np.prod(shape)), np.float32)
        kept = read_positions(reader, values.size)
        values[kept] = reader.floats(int(kept.sum()), self._value_bits)
        return jnp.asarray(values.reshape(shape))

    def info(self, theta: Values) -> dict[str, Any]:
        """How many weights stay."""
        return {"kept": int(jnp.count_nonzero(theta))}


@dataclass(frozen=True)
class PruneL0(_Pruned):
    """At most `kappa` weights: the largest, of equals the first.

    Attributes:
        kappa: how many stay: a whole number, or a fraction up to 1.0 of all.
        precision: bits of a stored value: 32, or 16 (float16). For a codebook see `PruneQuantize`.
    """

    word: ClassVar = "prune"
    kappa: int | float
    precision: int = FLOAT_BITS

    def __post_init__(self) -> None:
        check_amount("kappa", self.kappa, "weights")
        check_float_format("precision", self.precision)

    def bind(self, target: Values, layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`; a fraction becomes a number."""
        check_fits(self.precision, target)
        return replace(self, kappa=count_of("kappa", self.kappa, target.size, "weights"))

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Values | None = None) -> Values:
        """See `Compression.compress`."""
        kept = largest(target, count_of("kappa", self.kappa, target.size, "weights"))
        return rounded(jnp.where(kept, target, 0), self.precision)

    def settle(self, theta: Values) -> Values:
        """See `Compression.settle`."""
        return rounded(theta, self.precision)

    @property
    def _value_bits(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.precision


@dataclass(frozen=True)
class PruneBelow(_Pruned):
    """The weights above `quality` times the standard deviation of all, Han et al. (2015), section 3.1.

    Bound to trained weights it is `PruneL0` with as many.

    Attributes:
        quality: of the threshold; at 0 all stay.
    """

    word: ClassVar = "prune_below"
    quality: float

    def __post_init__(self) -> None:
        check_weight("quality", self.quality)

    def bind(self, target: Values, layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`.

        Raises:
            ValueError: a quality at which nothing stays, or weights that are all zero.
        """
        if not jnp.any(target):
            raise ValueError("quality: all weights are zero, so that nothing is above any threshold; leave them out")
        count = int(jnp.count_nonzero(self.compress(target, 0.0)))
        if count == 0:
            top = float(jnp.max(jnp.abs(target)) / jnp.std(target))
            raise ValueError(
                f"quality: {self.quality:g}; the largest weight is {top:.3g} standard deviations, give less"
            )
        return PruneL0(count)

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Values | None = None) -> Values:
        """See `Compression.compress`."""
        return jnp.where(jnp.abs(target) > self.quality * jnp.std(target), target, 0)


@dataclass(frozen=True)
class PruneL1(_Pruned):
    """sum |w| <= kappa: the exact Euclidean projection, Duchi et al. (2008), figure 1.

    Exact to rounding for millions of float32 weights: what the sort finds is refined by Newton's method on the sum.

    Attributes:
        kappa: radius of the ball.
    """

    word: ClassVar = "prune_l1"
    kappa: float

    def __post_init__(self) -> None:
        check_weight("kappa", self.kappa)

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Values | None = None) -> Values:
        """See `Compression.compress`."""
        if self.kappa == 0:
            return jnp.zeros_like(target)
        size = jnp.sort(jnp.abs(target.reshape(-1)))[::-1]
        counts = jnp.arange(1, size.size + 1)
        levels = (jnp.cumsum(size) - self.kappa) / counts.astype(size.dtype)
        last = jnp.max(jnp.where(size > levels, counts, 1)) - 1
        # A level below the exact one; the little that it lacks is then found with all the digits that it has.
        near = jnp.maximum(jnp.abs(target) - jnp.maximum(levels[last], 0) * (1 - _SLACK), 0)
        return jnp.sign(target) * self._projected(near.reshape(-1)).reshape(target.shape)

    def _projected(self, size: Float[Array, " d"]) -> Float[Array, " d"]:
        """Sizes that lose the same until their sum is kappa, by Newton's method from 0, which never overshoots.

        They come out of the loop as they are summed there: outside, a compiler may add what is lost here to the level
        before, and round anew.
        """

        def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            level, _ = state
            above = jnp.maximum(size - level, 0)
            active = jnp.maximum(jnp.sum(above > 0), 1).astype(size.dtype)
            return jnp.maximum(level + (_pairwise_sum(above) - self.kappa) / active, 0), above

        return lax.fori_loop(0, _NEWTON_STEPS + 1, step, (jnp.zeros((), size.dtype), size))[1]


_SLACK = 1e-3  # relative: much more than the error of a cumulative sum in float32
_NEWTON_STEPS = 4


def _pairwise_sum(values: Float[Array, " d"]) -> Float[Array, ""]:
    """The sum by halves, whose error grows with log d."""
    while values.size > 1:
        half = (values.size + 1) // 2
        values = values[:half] + jnp.pad(values[half:], (0, 2 * half - values.size))
    return jnp.sum(values)


@dataclass(frozen=True)
class PenaltyL0(_Pruned):
    """alpha times the number of weights: those of more than sqrt(2 alpha / mu) stay.

    Attributes:
        alpha: the price of a weight.
    """

    word: ClassVar = "penalty_l0"
    alpha: float

    def __post_init__(self) -> None:
        check_weight("alpha", self.alpha)

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Values | None = None) -> Values:
        """See `Compression.compress`; nothing stays at mu = 0 and alpha > 0."""
        pays = jnp.asarray(mu, target.dtype) * target * target > 2 * self.alpha
        return jnp.where(pays | (self.alpha == 0), target, 0)

    def penalty(self, theta: Values) -> Float[Array, ""]:
        """Alpha times the weights that are not zero."""
        return self.alpha * jnp.sum(theta != 0).astype(theta.dtype)


@dataclass(frozen=True)
class PenaltyL1(_Pruned):
    """alpha sum |w|: soft thresholding by alpha / mu.

    Attributes:
        alpha: weight of the penalty.
    """

    word: ClassVar = "penalty_l1"
    alpha: float

    def __post_init__(self) -> None:
        check_weight("alpha", self.alpha)

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Values | None = None) -> Values:
        """See `Compression.compress`; nothing stays at mu = 0 and alpha > 0."""
        mu = jnp.asarray(mu, target.dtype)
        level = self.alpha / jnp.where(mu > 0, mu, 1)
        shrunk = soft_threshold(target.reshape(1, -1), level).reshape(target.shape)
        return jnp.where((mu > 0) | (self.alpha == 0), shrunk, 0)

    def penalty(self, theta: Values) -> Float[Array, ""]:
        """Alpha times the sum of the absolute values."""
        return self.alpha * jnp.sum(jnp.abs(theta))


@dataclass(frozen=True)
class PruneQuantize(Compression):
    """The `kappa` largest weights, each one of k values; the others 0. Han et al., Deep Compression (2016), section 3.

    Theta is a `Codebook` in which code 0 is a pruned weight, and i > 0 has the value i - 1. A local minimum.

    Attributes:
        kappa: how many weights stay: a whole number, or a fraction up to 1.0 of all.
        k: how many values.
        init: one of `k_means.INITS`.
    """

    word: ClassVar = "prune_quantize"
    kappa: int | float
    k: int
    init: str = "k-means++"

    def __post_init__(self) -> None:
        check_amount("kappa", self.kappa, "weights")
        check_k(self.k)
        check_choice("init", self.init, INITS)

    def bind(self, target: Values, layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`; a fraction becomes a number."""
        kappa = count_of("kappa", self.kappa, target.size, "weights")
        if self.k > kappa:
            raise ValueError(f"k: {self.k} values for {kappa} weights that stay; give at most that many")
        check_distinct(self.k, target[largest(target, kappa)])
        return replace(self, kappa=kappa)

    def compress(self, target: Values, mu: Float[ArrayLike, ""], start: Codebook | None = None) -> Codebook:
        """See `Compression.compress`."""
        kappa = count_of("kappa", self.kappa, target.size, "weights")
        kept = largest(target, kappa)
        values = target.reshape(-1)[jnp.nonzero(kept.reshape(-1), size=kappa)[0]]
        cold = start is None
        centers = means_from_scratch(values, self.k, 0, self.init) if cold else means_from(values, start.centers)
        return Codebook(centers, jnp.where(kept, nearest(target, centers) + 1, 0))

    def decompress(self, theta: Codebook) -> Values:
        """Each weight's value."""
        return jnp.pad(theta.centers, (1, 0))[theta.codes]

    def bits(self, theta: Codebook) -> int:
        """The values, gaps between the weights that stay, and ceil(log2 k) for each of these."""
        kept = np.asarray(theta.codes).reshape(-1) != 0
        return FLOAT_BITS * self.k + position_bits(kept) + width_of(self.k) * int(kept.sum())

    def encode(self, theta: Codebook) -> Bits:
        """Values, gaps, codes."""
        codes = np.asarray(theta.codes).reshape(-1)
        stream = write_bits(codes[codes != 0] - 1, width_of(self.k))
        return np.concatenate([write_floats(theta.centers), write_positions(codes != 0), stream])

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Codebook:
        """See `Compression.decode`."""
        codes = np.zeros(int(np.prod(shape)), np.int32)
        centers = reader.floats(self.k)
        kept = read_positions(reader, codes.size)
        codes[kept] = reader.integers(int(kept.sum()), width_of(self.k)) + 1
        return Codebook(jnp.asarray(centers), jnp.asarray(codes.reshape(shape)))

    def info(self, theta: Codebook) -> dict[str, Any]:
        """The values, and how many weights stay."""
        return {"centers": np.asarray(theta.centers).tolist(), "kept": int(jnp.count_nonzero(theta.codes))}
