"""A column-sparse term: some columns of the matrix, that is some (window position, input channel) pairs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Shaped

from solvers.terms import Columns
from unified_approx.im2col import Geometry, convolve, output_shape, window_slices
from unified_approx.layers.common import (
    CHANNELS,
    PATCHES,
    Index,
    TermLayer,
    check_execution,
    check_indices,
    check_shape,
    index,
    parameter,
)


class ColumnsTerm(TermLayer):
    """Kept columns only.

    Executions:
        channels: a dense convolution of the input channels that have any kept column, its kernel filled up with zeros;
            nothing is wasted where whole channels were kept.
        patches: only the kept columns of the patches are cut out of x, window position by window position, and
            multiplied by the values. Pays where a convolution is slow: very small images.
    A dense layer has the first only: a gather and a product.

    Attributes:
        values: (n, k).
        indices: the kept columns, (k,), strictly increasing.
        channels: the input channels that are read, (q,), increasing.
        slots: where each kept column stands in the matrix of the q channels, (k,).
        counts: kept columns per window position, static.
    """

    kind = "columns"
    term_type = Columns

    def __init__(
        self,
        values: nnx.Param[Array],
        indices: Index,
        channels: Index,
        slots: Index,
        counts: tuple[int, ...],
        geometry: Geometry,
        execution: str = CHANNELS,
    ):
        """Use `from_term`."""
        self.values = values
        self.indices = indices
        self.channels = channels
        self.slots = slots
        self.counts = counts
        self.geometry = geometry
        self.execution = check_execution(execution, self.executions())

    @classmethod
    def from_term(
        cls, term: Columns, geometry: Geometry, *, dtype: DTypeLike = "float32", execution: str | None = None
    ) -> "ColumnsTerm":
        """See `TermLayer.from_term`."""
        shape = geometry.matrix_shape
        check_indices("indices", term.indices, shape.p)
        check_shape("values", term.values, (shape.n, len(term.indices)))
        place, channel = np.divmod(term.indices, geometry.c_in)
        channels, rank = np.unique(channel, return_inverse=True)
        counts = tuple(int(c) for c in np.bincount(place, minlength=prod(geometry.window)))
        slots = place * len(channels) + rank
        layer_index = (index(term.indices), index(channels), index(slots))
        return cls(parameter(term.values, dtype), *layer_index, counts, geometry, execution or CHANNELS)

    def __call__(self, x: Float[Array, "batch *spatial c_in"]) -> Float[Array, "batch *out n"]:
        """The kept columns times what they read of x."""
        if not sum(self.counts):
            return jnp.zeros((x.shape[0], *output_shape(x.shape[1:-1], self.geometry), self.geometry.c_out), x.dtype)
        return self._by_patches(x) if self.execution == PATCHES else self._by_channels(x)

    def _by_channels(self, x: Array) -> Array:
        q = self.channels.shape[0]
        kernel = self._scatter(self.slots, q, x.dtype)
        return convolve(_pick(x, self.channels[...]), kernel, replace(self.geometry, c_in=q))

    def _by_patches(self, x: Array) -> Array:
        local = self.indices[...] % self.geometry.c_in
        used = [i for i, count in enumerate(self.counts) if count]
        ends = np.cumsum(self.counts)
        pieces = [
            _pick(part, local[ends[i] - self.counts[i] : ends[i]])
            for i, part in zip(used, window_slices(x, self.geometry, used), strict=True)
        ]
        return jnp.concatenate(pieces, axis=-1) @ self.values[...].T.astype(x.dtype)

    def _scatter(self, at: Index, channels: int, dtype: DTypeLike | None) -> Array:
        """The values as a kernel of that many input channels, zero where no column is kept."""
        shape = (*self.geometry.window, channels, self.geometry.c_out)
        rows = jnp.asarray(self.values[...], dtype).T
        if rows.size == prod(shape):
            return rows.reshape(shape)
        return _put_rows(rows, at[...], shape)

    def kernel(self, dtype: DTypeLike | None = None) -> Float[Array, "*window c_in n"]:
        """The values scattered to their columns."""
        return self._scatter(self.indices, self.geometry.c_in, dtype)

    def executions(self) -> tuple[str, ...]:
        """`channels`, and `patches` for a convolution."""
        return (CHANNELS, PATCHES) if self.geometry.window else (CHANNELS,)

    def with_execution(self, execution: str) -> "ColumnsTerm":
        """See `TermLayer.with_execution`."""
        arrays = (self.values, self.indices, self.channels, self.slots)
        return type(self)(*arrays, self.counts, self.geometry, execution)

    def macs(self, spatial: Sequence[int], execution: str | None = None) -> int:
        """By channels: whole windows of the channels read; by patches: the values. Times output positions."""
        columns = sum(self.counts)
        if (execution or self.execution) == CHANNELS:
            columns = prod(self.geometry.window) * self.channels.shape[0]
        return prod(output_shape(spatial, self.geometry)) * columns * self.geometry.c_out

    def copies(self, execution: str | None = None) -> int:
        """By channels: those read, unless all are; by patches: the columns."""
        if (execution or self.execution) == PATCHES:
            return sum(self.counts)
        return self.channels.shape[0] % self.geometry.c_in

    def tensors(self) -> dict[str, Shaped[Array, "..."]]:
        """`values` and `indices`; the rest follows from them."""
        return {"values": self.values[...], "indices": self.indices[...]}


@partial(jax.jit, static_argnums=2, inline=True)  # one compilation where it is called by itself
def _put_rows(rows: Array, at: Array, shape: tuple[int, ...]) -> Array:
    """An array of zeros but for the rows at these places, in a shape of the same number of columns."""
    empty = jnp.zeros((prod(shape[:-1]), shape[-1]), rows.dtype)
    return empty.at[at].set(rows, unique_indices=True, indices_are_sorted=True).reshape(shape)


def _pick(x: Array, channels: Array) -> Array:
    """x[..., channels] for increasing channels; x itself when all are meant."""
    if channels.shape[0] == x.shape[-1]:
        return x
    return x.at[..., channels].get(unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds")
