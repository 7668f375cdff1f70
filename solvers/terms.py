"""The pieces a compressed layer is made of. A layer's matrix is the sum of its terms' matrices.

Terms are plain NumPy arrays of exactly the size that is stored: no masks, no padding. They are what a solve hands
to whoever rebuilds the network. A new kind of term is one class here and one layer module in the network library.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log2, prod
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32


@dataclass(frozen=True)
class MatrixShape:
    """A layer as a matrix (n, p): n = c_out outputs, p = prod(window) * c_in inputs, input channel fastest.

    The order is that of a Flax HWIO kernel: `kernel.reshape(p, n).T` is the matrix. A dense layer has window ().
    """

    window: tuple[int, ...]
    c_in: int
    c_out: int

    @property
    def n(self) -> int:
        """Rows: output channels."""
        return self.c_out

    @property
    def p(self) -> int:
        """Columns: input features."""
        return prod(self.window) * self.c_in


def index_bits(kept: int, total: int) -> int:
    """Bits to say which `kept` of `total` items are stored: the cheaper of a list of indices and a bitmap."""
    if kept == total:
        return 0
    return min(kept * max(1, ceil(log2(total))), total)


@runtime_checkable
class Term(Protocol):
    """One summand of a compressed layer's matrix."""

    @property
    def num_params(self) -> int:
        """Stored values (indices not counted)."""
        ...

    def index_bits(self, shape: MatrixShape) -> int:
        """Bits of the stored indices."""
        ...

    def matrix(self, shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
        """The term as a dense matrix."""
        ...

    def with_rows_scaled(self, scale: Float32[np.ndarray, " n"]) -> "Term":
        """The term whose matrix is diag(scale) times this one's."""
        ...


@dataclass(frozen=True)
class Dense:
    """All entries kept."""

    values: Float32[np.ndarray, "n p"]

    @property
    def num_params(self) -> int:
        """Stored values."""
        return self.values.size

    def index_bits(self, shape: MatrixShape) -> int:
        """No indices."""
        return 0

    def matrix(self, shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
        """The values themselves."""
        return self.values

    def with_rows_scaled(self, scale: Float32[np.ndarray, " n"]) -> "Dense":
        """Scale the values."""
        return Dense(self.values * scale[:, None])


@dataclass(frozen=True)
class Columns:
    """Column-sparse: `values` stand at the columns `indices` (strictly increasing), zero elsewhere."""

    values: Float32[np.ndarray, "n k"]
    indices: Int32[np.ndarray, " k"]

    @property
    def num_params(self) -> int:
        """Stored values."""
        return self.values.size

    def index_bits(self, shape: MatrixShape) -> int:
        """Which columns are kept."""
        return index_bits(len(self.indices), shape.p)

    def matrix(self, shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
        """Scatter the values."""
        out = np.zeros((shape.n, shape.p), np.float32)
        out[:, self.indices] = self.values
        return out

    def with_rows_scaled(self, scale: Float32[np.ndarray, " n"]) -> "Columns":
        """Scale the values."""
        return Columns(self.values * scale[:, None], self.indices)


@dataclass(frozen=True)
class LowRank:
    """u v with v on the columns `indices` only.

    In the gauge form `pivots` lists r rows of u that are the identity and are not stored: then `u` holds the other
    n - r rows, in increasing order of their row number. Without a gauge `pivots` is empty and u is (n, r).
    """

    u: Float32[np.ndarray, "rows r"]
    v: Float32[np.ndarray, "r k"]
    indices: Int32[np.ndarray, " k"]
    pivots: Int32[np.ndarray, " pivots"] = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.v.shape[0]

    @property
    def num_params(self) -> int:
        """Stored values."""
        return self.u.size + self.v.size

    def index_bits(self, shape: MatrixShape) -> int:
        """Which columns v reads, and which rows of u are the identity (in order, so not a bitmap)."""
        pivot_bits = len(self.pivots) * max(1, ceil(log2(shape.n))) if len(self.pivots) else 0
        return index_bits(len(self.indices), shape.p) + pivot_bits

    def full_u(self, n: int) -> Float32[np.ndarray, "n r"]:
        """U with the identity rows written out: row pivots[i] is the i-th unit vector."""
        if not len(self.pivots):
            return self.u
        out = np.zeros((n, self.rank), np.float32)
        out[self.pivots] = np.eye(self.rank, dtype=np.float32)
        out[np.setdiff1d(np.arange(n), self.pivots)] = self.u
        return out

    def matrix(self, shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
        """U V, scattered to the columns."""
        out = np.zeros((shape.n, shape.p), np.float32)
        out[:, self.indices] = self.full_u(shape.n) @ self.v
        return out

    def with_rows_scaled(self, scale: Float32[np.ndarray, " n"]) -> "LowRank":
        """Scale the rows of u; the result has no gauge, since its identity rows are scaled too."""
        return LowRank(self.full_u(len(scale)) * scale[:, None], self.v, self.indices)


@dataclass(frozen=True)
class Spatial:
    """Spatial low rank of a (kh, kw) kernel: a (1, kw) convolution to r channels, then a (kh, 1) convolution.

    The kernel is K[i, j, c, o] = sum_s first[s, j * c_in + c] * second[o, i, s]. In the gauge form `pivots` lists r
    columns of `first` that are the identity and are not stored: then `first` holds the other kw * c_in - r columns.
    """

    first: Float32[np.ndarray, "r cols"]
    second: Float32[np.ndarray, "n kh r"]
    pivots: Int32[np.ndarray, " pivots"] = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def rank(self) -> int:
        """Channels between the two convolutions."""
        return self.second.shape[2]

    @property
    def num_params(self) -> int:
        """Stored values."""
        return self.first.size + self.second.size

    def index_bits(self, shape: MatrixShape) -> int:
        """Which columns of the first factor are the identity (in order, so not a bitmap)."""
        if not len(self.pivots):
            return 0
        return len(self.pivots) * max(1, ceil(log2(shape.window[1] * shape.c_in)))

    def full_first(self, columns: int) -> Float32[np.ndarray, "r columns"]:
        """The first factor (r, kw * c_in) with the identity columns written out."""
        if not len(self.pivots):
            return self.first
        out = np.zeros((self.rank, columns), np.float32)
        out[:, self.pivots] = np.eye(self.rank, dtype=np.float32)
        out[:, np.setdiff1d(np.arange(columns), self.pivots)] = self.first
        return out

    def matrix(self, shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
        """The composed kernel as a matrix."""
        first = self.full_first(shape.window[1] * shape.c_in)
        return np.einsum("ois,sq->oiq", self.second, first).reshape(shape.n, shape.p)

    def with_rows_scaled(self, scale: Float32[np.ndarray, " n"]) -> "Spatial":
        """Scale the second factor."""
        return Spatial(self.first, self.second * scale[:, None, None], self.pivots)


def total_matrix(terms: Sequence[Term], shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
    """The sum of the terms' matrices; zero without terms."""
    out = np.zeros((shape.n, shape.p), np.float32)
    for term in terms:
        out += term.matrix(shape)
    return out


# The name of each kind of term in files.
TERMS: dict[str, type] = {"dense": Dense, "columns": Columns, "low_rank": LowRank, "spatial": Spatial}
