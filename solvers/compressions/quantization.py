"""Quantization to values of the weights' own: every weight becomes one of few numbers that are stored."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from solvers.compressions.base import FLOAT_BITS, Compression
from solvers.compressions.bits import Bits, Reader, width_of, write_bits, write_floats
from solvers.compressions.checks import check_choice, check_distinct, check_k
from solvers.compressions.k_means import INITS, means_from, means_from_scratch
from solvers.compressions.optimal_codebook import optimal_centers
from solvers.terms import MatrixShape


class Codebook(NamedTuple):
    """Which value each weight has.

    Attributes:
        centers: the values, increasing where they are nearest to what they stand for.
        codes: their number, for each weight.
    """

    centers: Float[Array, " k"]
    codes: Int[Array, "..."]


def nearest(target: Float[Array, "..."], centers: Float[Array, " k"]) -> Int[Array, "..."]:
    """Number of the nearest of increasing centers."""
    edges = (centers[1:] + centers[:-1]) / 2
    method = "compare_all" if centers.size <= 64 else "scan"  # as many comparisons as edges, but no gather
    return jnp.searchsorted(edges, target.reshape(-1), method=method).reshape(target.shape).astype(jnp.int32)


class _OwnValues(Compression):
    """Theta is a `Codebook` whose values are stored."""

    k: int

    def _check_size(self, target: Float[Array, "..."]) -> None:
        if self.k > target.size:
            raise ValueError(f"k: {self.k} values for {target.size} weights; give at most that many")

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`; refuses more values than there are distinct weights."""
        self._check_size(target)
        check_distinct(self.k, target)
        return self

    def decompress(self, theta: Codebook) -> Float[Array, "..."]:
        """Each weight's value."""
        return theta.centers[theta.codes]

    def bits(self, theta: Codebook) -> int:
        """ceil(log2 k) for each weight, and the values."""
        return width_of(theta.centers.size) * theta.codes.size + FLOAT_BITS * theta.centers.size

    def encode(self, theta: Codebook) -> Bits:
        """The values, then the codes."""
        return np.concatenate([write_floats(theta.centers), write_bits(np.asarray(theta.codes), width_of(self.k))])

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Codebook:
        """See `Compression.decode`."""
        centers = reader.floats(self.k)
        codes = reader.integers(int(np.prod(shape)), width_of(self.k))
        return Codebook(jnp.asarray(centers), jnp.asarray(codes.reshape(shape), jnp.int32))

    def info(self, theta: Codebook) -> dict[str, Any]:
        """The values."""
        return {"centers": np.asarray(theta.centers).tolist()}


@dataclass(frozen=True)
class AdaptiveCodebook(_OwnValues):
    """k values of its own, by k-means: a local minimum, from the codebook before if there is one.

    Attributes:
        k: how many values.
        seed: of the starts.
        init: one of `k_means.INITS`.
    """

    word: ClassVar = "quantize"
    k: int
    seed: int = 0
    init: str = "k-means++"

    def __post_init__(self) -> None:
        check_k(self.k)
        check_choice("init", self.init, INITS)

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Codebook | None = None
    ) -> Codebook:
        """See `Compression.compress`."""
        self._check_size(target)
        cold = start is None
        centers = (
            means_from_scratch(target, self.k, self.seed, self.init) if cold else means_from(target, start.centers)
        )
        return Codebook(centers, nearest(target, centers))


@dataclass(frozen=True)
class OptimalCodebook(_OwnValues):
    """k values of its own, the best there are: exact k-means on a line by dynamic programming, Wu (1991).

    Attributes:
        k: how many values.
    """

    word: ClassVar = "quantize_optimal"
    k: int

    def __post_init__(self) -> None:
        check_k(self.k)

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Codebook | None = None
    ) -> Codebook:
        """See `Compression.compress`; nothing depends on the start. The search runs on the host, traced or not."""
        self._check_size(target)
        shape = jax.ShapeDtypeStruct((self.k,), target.dtype)
        centers = jax.pure_callback(self._centers, shape, target.reshape(-1))
        return Codebook(centers, nearest(target, centers))

    def _centers(self, values: ArrayLike) -> Float[np.ndarray, " k"]:
        known = np.asarray(values)
        return optimal_centers(known, self.k).astype(known.dtype)


class Scaled(NamedTuple):
    """Signs times one scale.

    Attributes:
        scale: of all weights.
        signs: -1, 0 or 1.
    """

    scale: Float[Array, ""]
    signs: Int[Array, "..."]


class _OneScale(Compression):
    """Theta is `Scaled`: the scale is stored, and a few bits for each sign."""

    _lowest: ClassVar[int]
    _step: ClassVar[int]
    _width: ClassVar[int]

    def decompress(self, theta: Scaled) -> Float[Array, "..."]:
        """Scale times signs."""
        return theta.scale * theta.signs.astype(theta.scale.dtype)

    def bits(self, theta: Scaled) -> int:
        """Those of the signs, and the scale."""
        return self._width * theta.signs.size + FLOAT_BITS

    def encode(self, theta: Scaled) -> Bits:
        """The scale, then the signs."""
        codes = (np.asarray(theta.signs) - self._lowest) // self._step
        return np.concatenate([write_floats(theta.scale), write_bits(codes, self._width)])

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Scaled:
        """See `Compression.decode`."""
        scale = reader.floats(1)[0]
        codes = reader.integers(int(np.prod(shape)), self._width).reshape(shape)
        return Scaled(jnp.asarray(scale), jnp.asarray(codes * self._step + self._lowest, jnp.int8))

    def info(self, theta: Scaled) -> dict[str, Any]:
        """The scale."""
        return {"scale": float(theta.scale)}


@dataclass(frozen=True)
class ScaledBinary(_OneScale):
    """{-c, c}: c is the mean of |w|. Carreira-Perpinan & Idelbayev (2017), theorem A.2."""

    word: ClassVar = "binarize"
    _lowest, _step, _width = -1, 2, 1

    def compress(self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Scaled | None = None) -> Scaled:
        """See `Compression.compress`; zeros count as positive."""
        return Scaled(jnp.mean(jnp.abs(target)), jnp.where(target < 0, -1, 1).astype(jnp.int8))


@dataclass(frozen=True)
class ScaledTernary(_OneScale):
    """{-c, 0, c}: the j largest for which (sum |w|) / sqrt(j) is largest, c their mean. Ibid., theorem A.3."""

    word: ClassVar = "ternarize"
    _lowest, _step, _width = -1, 1, 2

    def compress(self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Scaled | None = None) -> Scaled:
        """See `Compression.compress`."""
        size = jnp.abs(target.reshape(-1))
        order = jnp.argsort(-size, stable=True)
        sums, counts = jnp.cumsum(size[order]), jnp.arange(1, size.size + 1)
        j = jnp.argmax(sums / jnp.sqrt(counts.astype(size.dtype)))
        kept = jnp.zeros(size.size, bool).at[order].set(counts <= j + 1).reshape(target.shape)
        c = sums[j] / (j + 1).astype(sums.dtype)
        return Scaled(c, jnp.where(kept, jnp.sign(target), 0).astype(jnp.int8))
