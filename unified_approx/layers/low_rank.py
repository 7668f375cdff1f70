"""A low-rank term u v, v on some columns of the matrix."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Shaped

from solvers.terms import Columns, LowRank
from unified_approx.im2col import Geometry, output_shape
from unified_approx.layers.columns import ColumnsTerm
from unified_approx.layers.common import Index, TermLayer, check_indices, check_shape, index, parameter


@partial(jax.jit, static_argnums=2, inline=True)  # one compilation where it is called by itself
def with_identity_rows(rows: Array, pivots: Array, r: int) -> Array:
    """The (n, r) factor whose row pivots[i] is the i-th unit vector and whose other rows are `rows`, in order.

    Writing it out costs n r values; on CPU that beats concatenating y and rows y and permuting n channels of every
    output, although the product then has r^2 multiply-adds more per position.
    """
    if not pivots.shape[0]:
        return rows
    n = rows.shape[0] + r
    kept = jnp.ones(n, bool).at[pivots].set(False)
    others = jnp.nonzero(kept, size=n - r)[0]
    full = jnp.zeros((n, r), rows.dtype).at[pivots].set(jnp.eye(r, dtype=rows.dtype), unique_indices=True)
    return full.at[others].set(rows, unique_indices=True, indices_are_sorted=True)


def check_pivots(pivots: np.ndarray, r: int, total: int) -> None:
    """Raise a ValueError unless there are no pivots or r distinct ones within range(total)."""
    check_indices("pivots", pivots, total, increasing=False)
    if len(pivots) not in (0, r):
        raise ValueError(f"pivots: {len(pivots)} of them for rank {r}; list one per rank, or none")


class LowRankTerm(TermLayer):
    """Two products: v to r channels (run as a column-sparse term), then u, a 1x1 convolution.

    Attributes:
        first: v, with the two executions of `ColumnsTerm`.
        u: (n, r), or its n - r rows that are not the identity.
        pivots: the identity rows, (r,) or empty.
    """

    kind = "low_rank"
    term_type = LowRank

    def __init__(self, first: ColumnsTerm, u: nnx.Param[Array], pivots: Index, geometry: Geometry):
        """Use `from_term`."""
        self.first = first
        self.u = u
        self.pivots = pivots
        self.geometry = geometry
        self.execution = first.execution

    @classmethod
    def from_term(
        cls, term: LowRank, geometry: Geometry, *, dtype: DTypeLike = "float32", execution: str | None = None
    ) -> "LowRankTerm":
        """See `TermLayer.from_term`; without an inner dimension the term is nothing: leave it out."""
        n, r = geometry.c_out, term.rank
        if r < 1:
            raise ValueError("rank=0: a low-rank term needs a rank of at least 1; leave it out")
        check_pivots(term.pivots, r, n)
        check_shape("u", term.u, (n - len(term.pivots), r))
        inner = replace(geometry, c_out=r)
        first = ColumnsTerm.from_term(Columns(term.v, term.indices), inner, dtype=dtype, execution=execution)
        return cls(first, parameter(term.u, dtype), index(term.pivots), geometry)

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.u.shape[1]

    def _u(self, dtype: DTypeLike | None) -> Array:
        return with_identity_rows(jnp.asarray(self.u[...], dtype), self.pivots[...], self.rank)

    def __call__(self, x: Float[Array, "batch *spatial c_in"]) -> Float[Array, "batch *out n"]:
        """The product with v, then that with u."""
        return self.first(x) @ self._u(x.dtype).T

    def kernel(self, dtype: DTypeLike | None = None) -> Float[Array, "*window c_in n"]:
        """The product of both factors as a kernel."""
        return self.first.kernel(dtype) @ self._u(dtype).T

    def executions(self) -> tuple[str, ...]:
        """Those of the first product."""
        return self.first.executions()

    def with_execution(self, execution: str) -> "LowRankTerm":
        """See `TermLayer.with_execution`."""
        return type(self)(self.first.with_execution(execution), self.u, self.pivots, self.geometry)

    def macs(self, spatial: Sequence[int], execution: str | None = None) -> int:
        """Both products; u in full, as it is run."""
        second = prod(output_shape(spatial, self.geometry)) * self.geometry.c_out * self.rank
        return self.first.macs(spatial, execution) + second

    def copies(self, execution: str | None = None) -> int:
        """Those of the first product."""
        return self.first.copies(execution)

    def tensors(self) -> dict[str, Shaped[Array, "..."]]:
        """`u`, `v`, `indices`, `pivots`."""
        first = self.first.tensors()
        return {"u": self.u[...], "v": first["values"], "indices": first["indices"], "pivots": self.pivots[...]}
