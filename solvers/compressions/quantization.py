"""Quantization: every weight becomes one of few values."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from solvers.compressions.base import FLOAT_BITS, width_of, write_bits, write_floats
from solvers.compressions.optimal_codebook import optimal_centers

_MAX_STEPS = 300
_STARTS = 10


class Codebook(NamedTuple):
    """Which value each weight has.

    Attributes:
        centers: the values, increasing.
        codes: their number, for each weight.
    """

    centers: Float[Array, " k"]
    codes: Int[Array, "..."]


class _Shared:
    """Theta is a `Codebook` whose values are stored."""

    def decompress(self, theta: Codebook) -> Float[Array, "..."]:
        """Each weight's value."""
        return theta.centers[theta.codes]

    def penalty(self, theta: Codebook) -> Float[Array, ""]:
        """0."""
        return jnp.zeros((), theta.centers.dtype)

    def bits(self, theta: Codebook) -> int:
        """ceil(log2 k) for each weight, and the values."""
        return width_of(theta.centers.size) * theta.codes.size + FLOAT_BITS * theta.centers.size

    def encode(self, theta: Codebook) -> UInt8[np.ndarray, " bits"]:
        """The values, then the codes."""
        codes = np.asarray(theta.codes).reshape(-1)
        return np.concatenate([write_floats(theta.centers), write_bits(codes, width_of(theta.centers.size))])


def _nearest(target: Float[Array, "..."], centers: Float[Array, " k"]) -> Int[Array, "..."]:
    """Number of the nearest of increasing centers."""
    edges = (centers[1:] + centers[:-1]) / 2
    return jnp.searchsorted(edges, target.reshape(-1)).reshape(target.shape).astype(jnp.int32)


class _Sorted(NamedTuple):
    """Increasing values and the sums of the first i of them, i = 0 ... d."""

    values: Float[Array, " d"]
    sums: Float[Array, " d1"]


def _sort(target: Float[Array, "..."]) -> _Sorted:
    values = jnp.sort(target.reshape(-1))
    # Sums of values around 0 lose less.
    return _Sorted(values, jnp.concatenate([jnp.zeros(1, values.dtype), jnp.cumsum(values)]))


def _lloyd(data: _Sorted, start: Float[Array, " k"]) -> Float[Array, " k"]:
    """k-means on a line from given centers: means of the intervals between the midpoints, until nothing changes."""

    def means(centers: Array) -> Array:
        edges = jnp.searchsorted(data.values, (centers[1:] + centers[:-1]) / 2)
        ends = jnp.concatenate([jnp.zeros(1, edges.dtype), edges, jnp.full(1, data.values.size, edges.dtype)])
        counts = ends[1:] - ends[:-1]
        new = (data.sums[ends[1:]] - data.sums[ends[:-1]]) / jnp.maximum(counts, 1).astype(data.sums.dtype)
        return jnp.sort(jnp.where(counts > 0, new, centers))

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        centers, _, steps = state
        return means(centers), centers, steps + 1

    going = lambda s: jnp.any(s[0] != s[1]) & (s[2] < _MAX_STEPS)  # noqa: E731
    return lax.while_loop(going, body, (means(start), start, jnp.zeros((), jnp.int32)))[0]


def _error(data: _Sorted, centers: Array) -> Float[Array, ""]:
    return jnp.sum((data.values - centers[_nearest(data.values, centers)]) ** 2)


def _spread(data: _Sorted, k: int, key: Array) -> Float[Array, " k"]:
    """The start of k-means++, Arthur & Vassilvitskii (2007): drawn in proportion to the squared distance."""

    def draw(centers: Array, i: Array, key: Array) -> Array:
        known = jnp.where(jnp.arange(k) < i, centers, jnp.inf)
        gap = jnp.min(jnp.abs(data.values[:, None] - known[None, :]), axis=1)
        weight = jnp.cumsum(jnp.where(i > 0, gap * gap, jnp.ones_like(gap)))
        return data.values[jnp.searchsorted(weight, jax.random.uniform(key, dtype=weight.dtype) * weight[-1])]

    keys = jax.random.split(key, k)
    body = lambda i, centers: centers.at[i].set(draw(centers, i, keys[i]))  # noqa: E731
    return jnp.sort(lax.fori_loop(0, k, body, jnp.zeros(k, data.values.dtype)))


@partial(jax.jit, static_argnums=(1, 2))
def _means_from_scratch(target: Float[Array, "..."], k: int, seed: int) -> Float[Array, " k"]:
    """The best of ten runs from k-means++ and one from equal shares."""
    data = _sort(target)
    shares = data.values[((np.arange(k) + 0.5) * data.values.size / k).astype(int)]
    keys = jax.random.split(jax.random.key(seed), _STARTS)
    starts = jnp.concatenate([lax.map(partial(_spread, data, k), keys), shares[None]])
    found = lax.map(partial(_lloyd, data), starts)
    return found[jnp.argmin(lax.map(partial(_error, data), found))]


@jax.jit
def _means_from(target: Float[Array, "..."], start: Float[Array, " k"]) -> Float[Array, " k"]:
    return _lloyd(_sort(target), start)


@jax.jit
def _coded(target: Float[Array, "..."], centers: Float[Array, " k"]) -> Codebook:
    return Codebook(centers, _nearest(target, centers))


def _check_k(k: int, target: Array | None = None) -> None:
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: {k!r} values; give a whole number >= 1")
    if target is not None and k > target.size:
        raise ValueError(f"k: {k} values for {target.size} weights; give at most that many")


@dataclass(frozen=True)
class AdaptiveCodebook(_Shared):
    """k values of its own, by k-means: a local minimum, from the codebook before if there is one.

    Attributes:
        k: how many values.
        seed: of the starts.
    """

    k: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_k(self.k)

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Codebook | None = None
    ) -> Codebook:
        """See `Compression.compress`."""
        _check_k(self.k, target)
        cold = start is None
        centers = _means_from_scratch(target, self.k, self.seed) if cold else _means_from(target, start.centers)
        return _coded(target, centers)


@dataclass(frozen=True)
class OptimalCodebook(_Shared):
    """k values of its own, the best there are: exact k-means on a line by dynamic programming, Wu (1991).

    Attributes:
        k: how many values.
    """

    k: int

    def __post_init__(self) -> None:
        _check_k(self.k)

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Codebook | None = None
    ) -> Codebook:
        """See `Compression.compress`; nothing depends on the start."""
        _check_k(self.k, target)
        shape = jax.ShapeDtypeStruct((self.k,), target.dtype)
        find = lambda values: optimal_centers(np.asarray(values), self.k).astype(values.dtype)  # noqa: E731
        return _coded(target, jax.pure_callback(find, shape, target.reshape(-1)))


@dataclass(frozen=True)
class FixedCodebook:
    """Given values, the same for every network: theta is the codes. See `binary`, `fixed_point`, `powers_of_two`.

    Attributes:
        values: increasing.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2 or list(self.values) != sorted(set(self.values)):
            raise ValueError(f"values: {self.values} are not at least two increasing numbers")

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Int[Array, "..."] | None = None
    ) -> Int[Array, "..."]:
        """The nearest value."""
        return _nearest(target, jnp.asarray(self.values, target.dtype))

    def decompress(self, theta: Int[Array, "..."]) -> Float[Array, "..."]:
        """Each weight's value."""
        return jnp.asarray(self.values, jnp.float32)[theta]

    def penalty(self, theta: Int[Array, "..."]) -> Float[Array, ""]:
        """0."""
        return jnp.zeros((), jnp.float32)

    def bits(self, theta: Int[Array, "..."]) -> int:
        """ceil(log2 k) for each weight."""
        return width_of(len(self.values)) * theta.size

    def encode(self, theta: Int[Array, "..."]) -> UInt8[np.ndarray, " bits"]:
        """The codes."""
        return write_bits(np.asarray(theta).reshape(-1), width_of(len(self.values)))


def binary() -> FixedCodebook:
    """{-1, 1}."""
    return FixedCodebook((-1.0, 1.0))


def fixed_point(bits: int, fraction: int) -> FixedCodebook:
    """Signed numbers of `bits` bits, `fraction` of them behind the point: multiples of 2^-fraction."""
    if not 1 <= bits <= 16:
        raise ValueError(f"bits: {bits!r}; give 1 to 16")
    half = 2 ** (bits - 1)
    return FixedCodebook(tuple(i * 2.0**-fraction for i in range(-half, half)))


def powers_of_two(largest: int, smallest: int) -> FixedCodebook:
    """0 and +-2^i for the exponents between `smallest` and `largest`."""
    if smallest > largest:
        raise ValueError(f"smallest, largest: {smallest} > {largest}; give the exponents in order")
    sizes = [2.0**i for i in range(smallest, largest + 1)]
    return FixedCodebook((*(-s for s in reversed(sizes)), 0.0, *sizes))


class Scaled(NamedTuple):
    """Signs times one scale.

    Attributes:
        scale: of all weights.
        signs: -1, 0 or 1.
    """

    scale: Float[Array, ""]
    signs: Int[Array, "..."]


class _OneScale:
    def decompress(self, theta: Scaled) -> Float[Array, "..."]:
        """Scale times signs."""
        return theta.scale * theta.signs.astype(theta.scale.dtype)

    def penalty(self, theta: Scaled) -> Float[Array, ""]:
        """0."""
        return jnp.zeros((), theta.scale.dtype)


@dataclass(frozen=True)
class ScaledBinary(_OneScale):
    """{-c, c}: c is the mean of |w|. Carreira-Perpinan & Idelbayev (2017), theorem A.2."""

    def compress(self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Scaled | None = None) -> Scaled:
        """See `Compression.compress`; zeros count as positive."""
        return Scaled(jnp.mean(jnp.abs(target)), jnp.where(target < 0, -1, 1).astype(jnp.int8))

    def bits(self, theta: Scaled) -> int:
        """One for each weight, and the scale."""
        return theta.signs.size + FLOAT_BITS

    def encode(self, theta: Scaled) -> UInt8[np.ndarray, " bits"]:
        """The scale, then the signs."""
        return np.concatenate([write_floats(theta.scale), write_bits(np.asarray(theta.signs).reshape(-1) > 0, 1)])


@dataclass(frozen=True)
class ScaledTernary(_OneScale):
    """{-c, 0, c}: the j largest for which (sum |w|) / sqrt(j) is largest, c their mean. Ibid., theorem A.3."""

    def compress(self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Scaled | None = None) -> Scaled:
        """See `Compression.compress`."""
        size = jnp.abs(target.reshape(-1))
        order = jnp.argsort(-size, stable=True)
        sums, counts = jnp.cumsum(size[order]), jnp.arange(1, size.size + 1)
        j = jnp.argmax(sums / jnp.sqrt(counts.astype(size.dtype)))
        kept = jnp.zeros(size.size, bool).at[order].set(counts <= j + 1).reshape(target.shape)
        c = sums[j] / (j + 1).astype(sums.dtype)
        return Scaled(c, jnp.where(kept, jnp.sign(target), 0).astype(jnp.int8))

    def bits(self, theta: Scaled) -> int:
        """Two for each weight, and the scale."""
        return 2 * theta.signs.size + FLOAT_BITS

    def encode(self, theta: Scaled) -> UInt8[np.ndarray, " bits"]:
        """The scale, then the signs plus 1."""
        return np.concatenate([write_floats(theta.scale), write_bits(np.asarray(theta.signs).reshape(-1) + 1, 2)])
