"""A Tucker-2 term: 1x1 to r_in channels, the window on these to r_out channels, 1x1 to all outputs."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Shaped

from solvers.tensor_terms import Tucker2
from unified_approx.im2col import Geometry, convolve, output_shape, patches
from unified_approx.layers.common import (
    CONVOLUTION,
    PATCHES,
    TermLayer,
    check_execution,
    check_shape,
    check_window,
    parameter,
)


class Tucker2Term(TermLayer):
    """Three convolutions; strides, padding and dilation are the middle one's.

    Executions:
        convolution: the middle one as a convolution.
        patches: as sliced patches times a matrix, which pays on very small images.

    Attributes:
        first: (r_in, c_in).
        core: (r_out, places, r_in), places of the window row-major.
        last: (n, r_out).
    """

    kind = "tucker2"
    term_type = Tucker2

    def __init__(
        self,
        first: nnx.Param[Array],
        core: nnx.Param[Array],
        last: nnx.Param[Array],
        geometry: Geometry,
        execution: str = CONVOLUTION,
    ):
        """Use `from_term`."""
        self.first = first
        self.core = core
        self.last = last
        self.geometry = geometry
        self.execution = check_execution(execution, self.executions())

    @classmethod
    def from_term(
        cls, term: Tucker2, geometry: Geometry, *, dtype: DTypeLike = "float32", execution: str | None = None
    ) -> "Tucker2Term":
        """See `TermLayer.from_term`; refuses dense layers."""
        check_window(cls.kind, geometry)
        r_out, r_in = term.core.shape[0], term.core.shape[2]
        if min(r_out, r_in) < 1:
            raise ValueError(f"ranks=({r_out}, {r_in}): a Tucker-2 term needs both to be at least 1; leave it out")
        check_shape("first", term.first, (r_in, geometry.c_in))
        check_shape("core", term.core, (r_out, prod(geometry.window), r_in))
        check_shape("last", term.last, (geometry.c_out, r_out))
        first, core, last = (parameter(a, dtype) for a in (term.first, term.core, term.last))
        return cls(first, core, last, geometry, execution or CONVOLUTION)

    @property
    def ranks(self) -> tuple[int, int]:
        """Channels (after, before) the core."""
        return self.core.shape[0], self.core.shape[2]

    @property
    def _inner(self) -> Geometry:
        r_out, r_in = self.ranks
        return replace(self.geometry, c_in=r_in, c_out=r_out)

    def __call__(self, x: Float[Array, "batch *spatial c_in"]) -> Float[Array, "batch *out n"]:
        """Fewer channels, the core, all outputs."""
        first, core, last = (a[...].astype(x.dtype) for a in (self.first, self.core, self.last))
        few = x @ first.T
        if self.execution == PATCHES:
            middle = patches(few, self._inner) @ core.reshape(core.shape[0], -1).T
        else:
            window = core.transpose(1, 2, 0).reshape(*self.geometry.window, *self.ranks[::-1])
            middle = convolve(few, window, self._inner)
        return middle @ last.T

    def kernel(self, dtype: DTypeLike | None = None) -> Float[Array, "*window c_in n"]:
        """The composed kernel."""
        first, core, last = (jnp.asarray(a[...], dtype) for a in (self.first, self.core, self.last))
        composed = jnp.einsum("asb,bc,oa->sco", core, first, last)
        return composed.reshape(*self.geometry.window, self.geometry.c_in, self.geometry.c_out)

    def executions(self) -> tuple[str, ...]:
        """Two forms of the middle convolution."""
        return (CONVOLUTION, PATCHES)

    def with_execution(self, execution: str) -> "Tucker2Term":
        """See `TermLayer.with_execution`."""
        return type(self)(self.first, self.core, self.last, self.geometry, execution)

    def macs(self, spatial: Sequence[int], execution: str | None = None) -> int:
        """The first convolution at every input position, the others at every output position."""
        out = prod(output_shape(spatial, self.geometry))
        return prod(spatial) * self.first.size + out * (self.core.size + self.last.size)

    def tensors(self) -> dict[str, Shaped[Array, "..."]]:
        """`first`, `core`, `last`."""
        return {"first": self.first[...], "core": self.core[...], "last": self.last[...]}
