"""k-means on a line: after sorting, a step costs no more than finding the k - 1 midpoints.

Sums over intervals are differences of prefix sums. These are kept as pairs of numbers whose sum is exact to about twice
the precision: a difference of plain float32 prefix sums of 10^6 values would be wrong in the first digit for a cluster
of a few values far out.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_MAX_STEPS = 300
_STARTS = 10
_SAMPLE = 4096
_LANES = 1024


class Line(NamedTuple):
    """Values in increasing order and the sums of the first i of them, i = 0 ... d, as pairs high + low."""

    values: Float[Array, " d"]
    high: Float[Array, " d1"]
    low: Float[Array, " d1"]


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """A + b as a rounded sum and its error; Knuth (1969), section 4.2.2."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _prefix_sums(values: Float[Array, " d"]) -> tuple[Float[Array, " d1"], Float[Array, " d1"]]:
    """Sums of the first i values, i = 0 ... d: each lane sums a part of its own, then the parts are added up."""
    length = -(-values.size // _LANES)
    lanes = jnp.pad(values, (0, length * _LANES - values.size)).reshape(_LANES, length).T
    zeros = jnp.zeros(_LANES, values.dtype)

    def within(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        high, error = _two_sum(carry[0], row)
        new = (high, carry[1] + error)
        return new, new

    def across(carry: tuple[Array, Array], part: tuple[Array, Array]) -> tuple:
        high, error = _two_sum(carry[0], part[0])
        return (high, carry[1] + part[1] + error), carry

    last, (high, low) = lax.scan(within, (zeros, zeros), lanes)
    _, before = lax.scan(across, (zeros[0], zeros[0]), last)
    total, error = _two_sum(high, jnp.broadcast_to(before[0][None, :], high.shape))
    pair = total, low + before[1][None, :] + error
    first, second = (jnp.pad(half.T.reshape(-1)[: values.size], (1, 0)) for half in pair)
    return first, second


def sort_line(target: Float[Array, "..."]) -> Line:
    """The values of an array of any shape."""
    values = jnp.sort(target.reshape(-1))
    return Line(values, *_prefix_sums(values))


def _clusters(line: Line, centers: Float[Array, " k"]) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """How many values are nearest to each of increasing centers, and their sums."""
    edges = jnp.searchsorted(line.values, (centers[1:] + centers[:-1]) / 2)
    ends = jnp.concatenate([jnp.zeros(1, edges.dtype), edges, jnp.full(1, line.values.size, edges.dtype)])
    low, high = (part[ends[1:]] - part[ends[:-1]] for part in (line.low, line.high))
    return (ends[1:] - ends[:-1]).astype(line.values.dtype), high + low


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
    mean = (line.high[-1] + line.low[-1]) / line.values.size
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
    d = line.values.size
    return line.values[((np.arange(count) + 0.5) * d / count).astype(int)]


@partial(jax.jit, static_argnums=(1, 2))
def means_from_scratch(target: Float[Array, "..."], k: int, seed: int) -> Float[Array, " k"]:
    """The best of ten runs from k-means++ on an even sample of the values, and one from equal shares."""
    line = sort_line(target)
    sample = _evenly(line, min(line.values.size, max(_SAMPLE, 8 * k)))
    keys = jax.random.split(jax.random.key(seed), _STARTS)
    starts = jnp.concatenate([lax.map(partial(_spread, sample, k), keys), _evenly(line, k)[None]])
    found = lax.map(partial(lloyd, line), starts)
    return found[jnp.argmax(lax.map(partial(_explained, line), found))]


@jax.jit
def means_from(target: Float[Array, "..."], start: Float[Array, " k"]) -> Float[Array, " k"]:
    """From given centers."""
    return lloyd(sort_line(target), start)
