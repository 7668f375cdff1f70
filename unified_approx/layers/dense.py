"""A term with all entries: the layer as it was."""

from collections.abc import Sequence
from math import prod

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Shaped

from solvers.terms import Dense
from unified_approx.im2col import Geometry, convolve, matrix_to_kernel, output_shape
from unified_approx.layers.common import CONVOLUTION, TermLayer, check_execution, check_shape, parameter


class DenseTerm(TermLayer):
    """All entries of the matrix, run as one convolution (or matrix product, for a dense layer)."""

    kind = "dense"
    term_type = Dense

    def __init__(self, values: nnx.Param[Array], geometry: Geometry, execution: str = CONVOLUTION):
        """Use `from_term`."""
        self.values = values
        self.geometry = geometry
        self.execution = check_execution(execution, self.executions())

    @classmethod
    def from_term(
        cls, term: Dense, geometry: Geometry, *, dtype: DTypeLike = "float32", execution: str | None = None
    ) -> "DenseTerm":
        """See `TermLayer.from_term`."""
        shape = geometry.matrix_shape
        check_shape("values", term.values, (shape.n, shape.p))
        return cls(parameter(term.values, dtype), geometry, execution or CONVOLUTION)

    def __call__(self, x: Float[Array, "batch *spatial c_in"]) -> Float[Array, "batch *out n"]:
        """The convolution of x."""
        return convolve(x, self.kernel(x.dtype), self.geometry)

    def kernel(self, dtype: DTypeLike | None = None) -> Float[Array, "*window c_in n"]:
        """The values as a kernel."""
        return matrix_to_kernel(jnp.asarray(self.values[...], dtype), self.geometry)

    def executions(self) -> tuple[str, ...]:
        """One form."""
        return (CONVOLUTION,)

    def with_execution(self, execution: str) -> "DenseTerm":
        """See `TermLayer.with_execution`."""
        return type(self)(self.values, self.geometry, execution)

    def macs(self, spatial: Sequence[int], execution: str | None = None) -> int:
        """Values times output positions."""
        return prod(output_shape(spatial, self.geometry)) * prod(self.values.shape)

    def tensors(self) -> dict[str, Shaped[Array, "..."]]:
        """`values`."""
        return {"values": self.values[...]}
