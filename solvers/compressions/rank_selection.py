"""Low rank of the rank that pays best, or none at all where the dense layer is cheaper."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from solvers.compressions.base import FLOAT_BITS, Compression, rounded
from solvers.compressions.bits import Bits, Reader, write_bits, write_floats
from solvers.compressions.checks import check_float_format, check_weight
from solvers.compressions.low_rank import FactoredForm, Factors, factors, product, svd_of
from solvers.compressions.one_of import OneOf
from solvers.compressions.reshaping import SCHEMES, check_scheme
from solvers.terms import MatrixShape, Term

MACS = "macs"


@dataclass(frozen=True)
class RankSelection(FactoredForm):
    """The rank is chosen too: min over r of alpha cost(r) + mu/2 ||w - rank-r part||^2, exactly.

    cost(r) is r (rows + columns), the values of both factors, times the multiply-adds of each; that of full rank is the
    dense layer's, which is then kept as it is: no rank above break-even is ever chosen. Idelbayev & Carreira-Perpinan,
    Low-rank compression of neural nets: learning the rank of each layer (2020), eq. 8, which has no dense choice.

    Attributes:
        alpha: price of a stored value, or of a multiply-add.
        cost: multiply-adds per stored value of (u, v): the output positions; 1 for storage. "macs" stands for them
            until someone who knows the images puts them in.
        scheme: of the layer as a matrix, see `Reshaping`; "auto": the one of lower objective.
        window: (kh, kw) of a convolution, which `bind` finds out.
        value_bits: 32, or 16 for float16 values.
    """

    word: ClassVar = "select_rank"
    alpha: float
    cost: float | tuple[float, float] | str = 1.0
    scheme: str = "rows"
    window: tuple[int, ...] = ()
    value_bits: int = FLOAT_BITS

    def __post_init__(self) -> None:
        check_scheme(self.scheme)
        check_float_format("value_bits", self.value_bits)
        check_weight("alpha", self.alpha)
        if isinstance(self.cost, str) and self.cost != MACS:
            raise ValueError(f"cost: {self.cost!r} is unknown; give numbers, or {MACS!r}")
        if isinstance(self.cost, tuple) and len(self.cost) != 2:
            raise ValueError(f"cost: {self.cost!r} are {len(self.cost)} numbers; give one, or two for (u, v)")
        for cost in () if isinstance(self.cost, str) else self._costs:
            check_weight("cost", cost)

    @property
    def _costs(self) -> tuple[float, float]:
        if isinstance(self.cost, str):
            raise ValueError(f"cost: {self.cost!r} depends on the images; give numbers, or put them in with `informed`")
        return self.cost if isinstance(self.cost, tuple) else (self.cost, self.cost)

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`; "auto" becomes a choice of both schemes for a convolution."""
        if self.scheme != "auto":
            return FactoredForm.bind(self, target, layers)
        schemes = SCHEMES if len(layers[0].window) == 2 else SCHEMES[:1]
        parts = tuple(replace(self, scheme=scheme).bind(target, layers) for scheme in schemes)
        return parts[0] if len(parts) == 1 else OneOf(parts)

    def _prices(self, rows: int, columns: int) -> Float[np.ndarray, " ranks"]:
        """Of every rank from 0 to the full one, which is dense."""
        per_u, per_v = self._costs
        prices = np.arange(min(rows, columns) + 1) * (rows * per_u + columns * per_v)
        prices[-1] = rows * columns * per_u
        return self.alpha * prices

    def compress(self, target: Float[Array, "n p"], mu: Float[ArrayLike, ""], start: Factors | None = None) -> Factors:
        """See `Compression.compress`; dense at mu = 0, as the first step of the algorithm wants it."""
        w = self.reshaping.apply(target)
        svd = svd_of(w)
        full = len(svd[1])
        energy = svd[1] ** 2
        left = jnp.concatenate([jnp.cumsum(energy[::-1])[::-1], jnp.zeros(1, energy.dtype)])
        weight = jnp.asarray(mu, w.dtype)
        rank = jnp.argmin(jnp.asarray(self._prices(*w.shape), w.dtype) + weight / 2 * left)
        dense = (rank == full) | ~(weight > 0)
        low = factors(svd, svd[1], jnp.where(dense, full, rank), full, self.value_bits)
        whole = _dense(rounded(w, self.value_bits))
        return Factors(jnp.where(dense, whole.u, low.u), jnp.where(dense, whole.v, low.v), low.rank)

    def suggested_mu(self, target: Float[Array, "n p"]) -> float:
        """Where a rank of 1 begins to pay: 2 alpha cost(1) / s_1^2, s_1 the largest singular value."""
        w = self.reshaping.apply(target)
        return self._pays_from(w.shape, float(svd_of(w)[1][0]))

    def _pays_from(self, shape: tuple[int, ...], largest: float) -> float:
        return 2 * float(self._prices(*shape)[1]) / largest**2

    def penalty(self, theta: Factors) -> Float[Array, ""]:
        """Alpha times the cost of the rank."""
        prices = self._prices(theta.u.shape[0], theta.v.shape[1])
        return jnp.asarray(prices, theta.u.dtype)[theta.rank]

    def _is_dense(self, theta: Factors) -> bool:
        return int(theta.rank) == min(theta.u.shape[0], theta.v.shape[1])

    def bits(self, theta: Factors) -> int:
        """The rank, and the values of both factors or of the dense matrix."""
        if not self._is_dense(theta):
            return super().bits(theta)
        return self._rank_width(theta) + self.value_bits * theta.u.shape[0] * theta.v.shape[1]

    def encode(self, theta: Factors) -> Bits:
        """The rank, then u and v, or the dense matrix."""
        if not self._is_dense(theta):
            return super().encode(theta)
        rank = write_bits([int(theta.rank)], self._rank_width(theta))
        return np.concatenate([rank, write_floats(product(theta), self.value_bits)])

    def _decode(self, reader: Reader, rank: int, rows: int, columns: int) -> Factors:
        if rank < min(rows, columns):
            return super()._decode(reader, rank, rows, columns)
        return _dense(jnp.asarray(reader.floats(rows * columns, self.value_bits).reshape(rows, columns)))

    def settle(self, theta: Factors) -> Factors:
        """See `Compression.settle`; a dense matrix is its product again."""
        return _dense(rounded(product(theta), self.value_bits)) if self._is_dense(theta) else super().settle(theta)

    def info(self, theta: Factors) -> dict[str, Any]:
        """The rank; of a dense matrix, as it is before the first step, also its singular values and `suggested_mu`."""
        found = super().info(theta)
        if not self._is_dense(theta):
            return found
        w = product(theta)
        sizes = np.asarray(svd_of(w)[1], np.float64)
        mu = self._pays_from(w.shape, float(sizes[0])) if sizes[0] > 0 else None  # no rank pays for zeros
        return found | {"singular_values": sizes.tolist(), "suggested_mu": mu}

    def terms(self, theta: Factors, shape: MatrixShape) -> tuple[Term, ...] | None:
        """One pair of factors, or None for the dense layer."""
        return None if self._is_dense(theta) else super().terms(theta, shape)


def _dense(w: Float[Array, "rows columns"]) -> Factors:
    """The matrix itself: one of the factors is the identity, so that nothing is rounded."""
    rows, columns = w.shape
    rank = jnp.asarray(min(rows, columns), jnp.int32)
    if rows < columns:
        return Factors(jnp.eye(rows, dtype=w.dtype), w, rank)
    return Factors(w, jnp.eye(columns, dtype=w.dtype), rank)
