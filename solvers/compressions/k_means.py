"""k-means on a line: after sorting, a step costs no more than finding the k - 1 midpoints.

A cluster's sum is that of the whole blocks of sorted values inside it, and of the parts of blocks at its ends. Sums of
many blocks are differences of prefix sums, kept as pairs of numbers that are exact to about twice the precision: with
plain float32 prefix sums of 10^6 values a cluster of a few values far out would be wrong in its first digit.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

_MAX_STEPS = 300
_STARTS = 10
_SAMPLE = 4096
_BLOCK = 1024


class Line(NamedTuple):
    """Values in increasing order.

    Attributes:
        values: in blocks, the last one filled up with its last value.
        size: how many there are.
        high: sums of the first i blocks, i = 0 ...
        low: what these sums lack.
    """

    values: Float[Array, "blocks block"]
    size: int
    high: Float[Array, " blocks1"]
    low: Float[Array, " blocks1"]

    def at(self, index: Int[Array, "..."] | Int[np.ndarray, "..."]) -> Float[Array, "..."]:
        """The values at these places."""
        return self.values.reshape(-1)[index]


def _in_order(values: Float[Array, " d"]) -> Float[Array, " d"]:
    """Sorted as integers whose order is the same: XLA compares floats on CPU six times as slowly."""
    whole = jnp.int32 if values.dtype.itemsize == 4 else jnp.int64
    low = jnp.iinfo(whole).max
    flip = lambda bits: jnp.where(bits < 0, bits ^ low, bits)  # noqa: E731
    ordered = jnp.sort(flip(lax.bitcast_convert_type(values, whole)))
    return lax.bitcast_convert_type(flip(ordered), values.dtype)


def sort_line(target: Float[Array, "..."]) -> Line:
    """The values of an array of any shape."""
    size = target.size
    values = jnp.pad(_in_order(target.reshape(-1)), (0, -size % _BLOCK), mode="edge").reshape(-1, _BLOCK)

    def add(carry: tuple[Array, Array], block: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        # A rounded sum and its error: Knuth (1969), section 4.2.2.
        total = carry[0] + block
        part = total - carry[0]
        new = total, carry[1] + ((carry[0] - (total - part)) + (block - part))
        return new, new

    zero = jnp.zeros((), values.dtype)
    _, (high, low) = lax.scan(add, (zero, zero), jnp.sum(values, axis=1))
    return Line(values, size, jnp.pad(high, (1, 0)), jnp.pad(low, (1, 0)))


def _sum(line: Line, start: Int[Array, ""], end: Int[Array, ""]) -> Float[Array, ""]:
    """Of the values start ... end - 1."""
    first, last = start // _BLOCK, end // _BLOCK
    places = jnp.arange(_BLOCK, dtype=start.dtype)

    def part(block: Array) -> Array:
        """Of those in one block."""
        here = places + block * _BLOCK
        row = line.values[jnp.minimum(block, len(line.values) - 1)]
        return jnp.sum(jnp.where((here >= start) & (here < end), row, 0))

    after = jnp.minimum(first + 1, last)
    whole = (line.high[last] - line.high[after]) + (line.low[last] - line.low[after])
    return part(first) + jnp.where(last > first, part(last) + whole, 0)


def _clusters(line: Line, centers: Float[Array, " k"]) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """How many values are nearest to each of increasing centers, and their sums."""
    edges = jnp.searchsorted(line.values.reshape(-1), (centers[1:] + centers[:-1]) / 2)
    edges = jnp.minimum(edges, line.size)
    ends = jnp.concatenate([jnp.zeros(1, edges.dtype), edges, jnp.full(1, line.size, edges.dtype)])
    sums = jax.vmap(lambda a, b: _sum(line, a, b))(ends[:-1], ends[1:])
    return (ends[1:] - ends[:-1]).astype(centers.dtype), sums


def lloyd(line: Line, start: Float[Array, " k"]) -> Float[Array, " k"]:
    """Increasing centers from given ones: means of what is nearest, until nothing changes; empty clusters stay put."""

    def means(centers: Array) -> Array:
        counts, sums = _clusters(line, centers)
        return jnp.sort(jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centers))

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        centers, _, steps = state
        return means(centers), centers, steps + 1

    def goes_on(state: tuple[Array, Array, Array]) -> Array:
        return jnp.any(state[0] != state[1]) & (state[2] < _MAX_STEPS)

    first = jnp.sort(start)
    return lax.while_loop(goes_on, body, (means(first), first, jnp.zeros((), jnp.int32)))[0]


def _explained(line: Line, centers: Float[Array, " k"]) -> Float[Array, ""]:
    """What clusters take off the squared error around the common mean."""
    counts, sums = _clusters(line, centers)
    mean = (line.high[-1] + line.low[-1]) / line.size
    return jnp.sum((sums - counts * mean) ** 2 / jnp.maximum(counts, 1))


def _spread(sample: Float[Array, " m"], k: int, key: Array) -> Float[Array, " k"]:
    """The start of k-means++, Arthur & Vassilvitskii (2007): drawn in proportion to the squared distance."""
    keys = jax.random.split(key, k)

    def draw(i: Array, centers: Array) -> Array:
        known = jnp.where(jnp.arange(k) < i, centers, jnp.inf)
        gap = jnp.min(jnp.abs(sample[:, None] - known[None, :]), axis=1)
        mass = jnp.cumsum(jnp.where(i > 0, gap * gap, jnp.ones_like(gap)))
        at = jnp.searchsorted(mass, jax.random.uniform(keys[i], dtype=mass.dtype) * mass[-1])
        return centers.at[i].set(sample[jnp.minimum(at, sample.size - 1)])

    return jnp.sort(lax.fori_loop(0, k, draw, jnp.zeros(k, sample.dtype)))


def _evenly(line: Line, count: int) -> Float[Array, " count"]:
    """`count` of the values, with as many of the others between any two of them."""
    return line.at(((np.arange(count) + 0.5) * line.size / count).astype(int))


INITS = ("k-means++", "linear", "random", "density")
"""Where the centers start: "k-means++", or one of the three of Deep Compression, Han et al. (2016), section 3.2."""


@partial(jax.jit, static_argnums=(1, 2, 3))
def means_from_scratch(target: Float[Array, "..."], k: int, seed: int, init: str = "k-means++") -> Float[Array, " k"]:
    """One run from equal steps ("linear"), values drawn at random or equal shares ("density"); or the best of many.

    "k-means++": ten runs from k-means++ on an even sample of the values, and one from equal shares.
    """
    line = sort_line(target)
    if init == "linear":
        return lloyd(line, jnp.linspace(line.at(np.array(0)), line.at(np.array(line.size - 1)), k, dtype=target.dtype))
    if init == "random":
        return lloyd(line, line.at(jax.random.choice(jax.random.key(seed), line.size, (k,), replace=False)))
    if init == "density":
        return lloyd(line, _evenly(line, k))
    sample = _evenly(line, min(line.size, max(_SAMPLE, 8 * k)))
    keys = jax.random.split(jax.random.key(seed), _STARTS)
    starts = jnp.concatenate([lax.map(partial(_spread, sample, k), keys), _evenly(line, k)[None]])
    found = lax.map(partial(lloyd, line), starts)
    return found[jnp.argmax(lax.map(partial(_explained, line), found))]


@jax.jit
def means_from(target: Float[Array, "..."], start: Float[Array, " k"]) -> Float[Array, " k"]:
    """From given centers."""
    return lloyd(sort_line(target), start)
