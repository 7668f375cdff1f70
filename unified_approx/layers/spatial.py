"""A spatially separated term of a 2-D convolution: a (1, kw) convolution to r channels, then a (kh, 1) convolution."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Shaped

from solvers.terms import Spatial
from unified_approx.im2col import Geometry, convolve, explicit_padding, normalize, output_shape
from unified_approx.layers.common import (
    CONVOLUTION,
    Index,
    TermLayer,
    check_execution,
    check_shape,
    check_window,
    index,
    parameter,
)
from unified_approx.layers.low_rank import check_pivots, with_identity_rows


class SpatialTerm(TermLayer):
    """Two thin convolutions; width strides with the first, height with the second.

    Attributes:
        first: (r, kw c_in), or its columns that are not the identity.
        second: (n, kh, r).
        pivots: the identity columns of the first factor, (r,) or empty.
    """

    kind = "spatial"
    term_type = Spatial

    def __init__(
        self,
        first: nnx.Param[Array],
        second: nnx.Param[Array],
        pivots: Index,
        geometry: Geometry,
        execution: str = CONVOLUTION,
    ):
        """Use `from_term`."""
        self.first = first
        self.second = second
        self.pivots = pivots
        self.geometry = geometry
        self.execution = check_execution(execution, self.executions())

    @classmethod
    def from_term(
        cls, term: Spatial, geometry: Geometry, *, dtype: DTypeLike = "float32", execution: str | None = None
    ) -> "SpatialTerm":
        """See `TermLayer.from_term`; refuses what is not a 2-D convolution."""
        check_window(cls.kind, geometry, axes=2)
        (kh, kw), r = geometry.window, term.rank
        if r < 1:
            raise ValueError("rank=0: a spatial term needs a rank of at least 1; leave it out")
        check_pivots(term.pivots, r, kw * geometry.c_in)
        check_shape("first", term.first, (r, kw * geometry.c_in - len(term.pivots)))
        check_shape("second", term.second, (geometry.c_out, kh, r))
        arrays = (parameter(term.first, dtype), parameter(term.second, dtype), index(term.pivots))
        return cls(*arrays, geometry, execution or CONVOLUTION)

    @property
    def rank(self) -> int:
        """Channels between the two convolutions."""
        return self.second.shape[2]

    def _kernels(self, dtype: DTypeLike | None) -> tuple[Array, Array]:
        """(1, kw, c_in, r) and (kh, 1, r, n)."""
        first = with_identity_rows(jnp.asarray(self.first[...], dtype).T, self.pivots[...], self.rank)
        second = jnp.asarray(self.second[...], dtype).transpose(1, 2, 0)
        return first.reshape(1, self.geometry.window[1], self.geometry.c_in, self.rank), second[:, None]

    def _halves(self, spatial: Sequence[int]) -> tuple[Geometry, Geometry]:
        """The geometries of the two convolutions on an input of that size."""
        g = normalize(self.geometry)
        (kh, kw), (sh, sw), (dh, dw) = g.window, g.strides, g.dilation
        height, width = explicit_padding(spatial, g)
        none = (0, 0)
        first = replace(g, window=(1, kw), c_out=self.rank, strides=(1, sw), dilation=(1, dw), padding=(none, width))
        second = replace(g, window=(kh, 1), c_in=self.rank, strides=(sh, 1), dilation=(dh, 1), padding=(height, none))
        return first, second

    def __call__(self, x: Float[Array, "batch *spatial c_in"]) -> Float[Array, "batch *out n"]:
        """Along the width, then along the height."""
        along_width, along_height = self._halves(x.shape[1:-1])
        first, second = self._kernels(x.dtype)
        return convolve(convolve(x, first, along_width), second, along_height)

    def kernel(self, dtype: DTypeLike | None = None) -> Float[Array, "*window c_in n"]:
        """K[i, j, c, o] = sum_s first[s, j c_in + c] second[o, i, s]."""
        first, second = self._kernels(dtype)
        return jnp.einsum("jcs,iso->ijco", first[0], second[:, 0])

    def executions(self) -> tuple[str, ...]:
        """One form."""
        return (CONVOLUTION,)

    def with_execution(self, execution: str) -> "SpatialTerm":
        """See `TermLayer.with_execution`."""
        return type(self)(self.first, self.second, self.pivots, self.geometry, execution)

    def macs(self, spatial: Sequence[int], execution: str | None = None) -> int:
        """Both convolutions; the first at every input row, before the stride along the height."""
        first, second = self._halves(spatial)
        between = output_shape(spatial, first)
        return sum(
            prod(output_shape(size, g)) * g.matrix_shape.p * g.c_out
            for size, g in ((spatial, first), (between, second))
        )

    def tensors(self) -> dict[str, Shaped[Array, "..."]]:
        """`first`, `second`, `pivots`."""
        return {"first": self.first[...], "second": self.second[...], "pivots": self.pivots[...]}
