"""A term whose entries are few different values: codes that are not trained, and the values, which are."""

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Integer, Shaped

from solvers.terms import Codebook
from unified_approx.im2col import Geometry, convolve, matrix_to_kernel, output_shape
from unified_approx.layers.common import Index, TermLayer, check_execution, check_shape, parameter

DECODE = "decode"
LOOKUP = "lookup"
_SUMMED = 16  # values up to which their gradients are sums over masks, faster than scattered additions


class CodebookTerm(TermLayer):
    """The shared weights of Deep Compression, Han et al. (2016), section 3: code 0 is zero, code i the i-th value.

    The gradient of a value is the sum of those of all weights that have it. Executions:
        decode: look every weight up, then convolve.
        lookup: add up the inputs of each value, then multiply by the values: k additions where there was one product.
    """

    kind = "codebook"
    term_type = Codebook

    def __init__(self, values: nnx.Param[Array], codes: Index, geometry: Geometry, execution: str = DECODE):
        """Use `from_term`."""
        self.values = values
        self.codes = codes
        self.geometry = geometry
        self.execution = check_execution(execution, self.executions())

    @classmethod
    def from_term(
        cls, term: Codebook, geometry: Geometry, *, dtype: DTypeLike = "float32", execution: str | None = None
    ) -> "CodebookTerm":
        """See `TermLayer.from_term`; codes take as few bytes as their number allows."""
        shape, k = geometry.matrix_shape, term.values.size
        check_shape("values", term.values, (term.values.size,))
        check_shape("codes", term.codes, (shape.n, shape.p))
        if term.codes.size and (term.codes.min() < 0 or term.codes.max() > k):
            raise ValueError(f"codes: from {term.codes.min()} to {term.codes.max()}; {k} values have codes 0 to {k}")
        codes = Index(jnp.asarray(term.codes.astype(np.min_scalar_type(k))))
        return cls(parameter(term.values, dtype), codes, geometry, execution or DECODE)

    def __call__(self, x: Float[Array, "batch *spatial c_in"]) -> Float[Array, "batch *out n"]:
        """See the class."""
        if self.execution == DECODE:
            return convolve(x, self.kernel(x.dtype), self.geometry)
        k = self.values.size
        ones = [matrix_to_kernel((self.codes[...] == i).astype(x.dtype), self.geometry) for i in range(1, k + 1)]
        sums = convolve(x, jnp.concatenate(ones, axis=-1), self._summing())
        return jnp.einsum("...kn,k->...n", sums.reshape(*sums.shape[:-1], k, -1), self.values[...].astype(x.dtype))

    def _summing(self) -> Geometry:
        """Of the convolution that adds the inputs up, for every value and output."""
        g = self.geometry
        return Geometry(g.window, g.c_in, g.c_out * self.values.size, g.strides, g.padding, g.dilation)

    def kernel(self, dtype: DTypeLike | None = None) -> Float[Array, "*window c_in n"]:
        """Every weight looked up."""
        values = jnp.asarray(self.values[...], dtype)
        return matrix_to_kernel(look_up(values, self.codes[...]), self.geometry)

    def executions(self) -> tuple[str, ...]:
        """Decode first."""
        return (DECODE, LOOKUP)

    def with_execution(self, execution: str) -> "CodebookTerm":
        """See `TermLayer.with_execution`."""
        return type(self)(self.values, self.codes, self.geometry, execution)

    def macs(self, spatial: Sequence[int], execution: str | None = None) -> int:
        """Entries times output positions; with look-up tables an addition for each value in place of each product."""
        dense = prod(output_shape(spatial, self.geometry)) * prod(self.codes.shape)
        return dense if (execution or self.execution) == DECODE else dense * self.values.size

    def tensors(self) -> dict[str, Shaped[Array, "..."]]:
        """`values` and `codes`."""
        return {"values": self.values[...], "codes": self.codes[...]}


@jax.custom_vjp
def look_up(values: Float[Array, " k"], codes: Integer[Array, "*shape"]) -> Float[Array, "*shape"]:
    """0 for code 0, the i-th value for code i."""
    return jnp.pad(values, (1, 0))[codes]


def _look_up(values: Array, codes: Array) -> tuple[Array, tuple[Array, Array]]:
    return look_up(values, codes), (values, codes)


def _gradient(kept: tuple[Array, Array], outer: Array) -> tuple[Array, None]:
    values, codes = kept
    if values.size <= _SUMMED:
        return jnp.stack([jnp.sum(jnp.where(codes == i + 1, outer, 0)) for i in range(values.size)]), None
    flat = jnp.zeros(values.size + 1, outer.dtype).at[codes.reshape(-1)].add(outer.reshape(-1))
    return flat[1:], None


look_up.defvjp(_look_up, _gradient)
