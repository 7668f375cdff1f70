"""The pieces a compressed layer is made of. A layer's matrix is the sum of its terms' matrices.

Terms are plain NumPy arrays of exactly the size that is stored: no masks, no padding. They are what a solve hands
to whoever rebuilds the network. A new kind of term is one class here and one layer module in the network library.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log2, prod
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32


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


def channels_of(read: Bool[np.ndarray, " columns"], c_in: int) -> Bool[np.ndarray, " c_in"]:
    """Which input channels the flagged columns belong to."""
    return np.any(read.reshape(-1, c_in), axis=0)


def moved(
    columns: Int[np.ndarray, " k"], kept: Int[np.ndarray, " channels"], c_in: int
) -> tuple[Bool[np.ndarray, " k"], Int32[np.ndarray, " left"]]:
    """Which columns are of the kept (increasing) input channels, and their numbers where there are no others."""
    place, channel = np.divmod(columns, c_in)
    here = np.isin(channel, kept)
    return here, (place[here] * len(kept) + np.searchsorted(kept, channel[here])).astype(np.int32)


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

    def with_rows(self, kept: Int[np.ndarray, " k"]) -> "Term":
        """The term of the output channels `kept` (increasing) alone, without what has no influence on these."""
        ...

    def channels_read(self, shape: MatrixShape) -> Bool[np.ndarray, " c_in"]:
        """Which input channels any stored value other than zero belongs to."""
        ...

    def with_channels(self, kept: Int[np.ndarray, " k"], shape: MatrixShape) -> "Term":
        """The same term where there are only the input channels `kept` (increasing); it must read no others."""
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

    def with_rows(self, kept: Int[np.ndarray, " k"]) -> "Dense":
        """Take the rows."""
        return Dense(self.values[kept])

    def channels_read(self, shape: MatrixShape) -> Bool[np.ndarray, " c_in"]:
        """Those with a column that is not zero."""
        return channels_of(np.any(self.values, axis=0), shape.c_in)

    def with_channels(self, kept: Int[np.ndarray, " k"], shape: MatrixShape) -> "Dense":
        """Take the columns."""
        return Dense(self.values[:, moved(np.arange(shape.p), kept, shape.c_in)[0]])


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

    def with_rows(self, kept: Int[np.ndarray, " k"]) -> "Columns":
        """Take the rows; columns that are zero then are not stored."""
        values = self.values[kept]
        used = values.any(axis=0)
        return Columns(values[:, used], self.indices[used])

    def channels_read(self, shape: MatrixShape) -> Bool[np.ndarray, " c_in"]:
        """Those with a kept column that is not zero."""
        read = np.zeros(shape.p, bool)
        read[self.indices] = self.values.any(axis=0)
        return channels_of(read, shape.c_in)

    def with_channels(self, kept: Int[np.ndarray, " k"], shape: MatrixShape) -> "Columns":
        """Number the columns anew."""
        here, indices = moved(self.indices, kept, shape.c_in)
        return Columns(self.values[:, here], indices)


@dataclass(frozen=True)
class Codebook:
    """Few different values: code 0 is zero, code i the i-th value."""

    values: Float32[np.ndarray, " k"]
    codes: Int32[np.ndarray, "n p"]

    @property
    def num_params(self) -> int:
        """Stored values."""
        return self.values.size

    def index_bits(self, shape: MatrixShape) -> int:
        """The codes, all of the same width."""
        return self.codes.size * max(1, ceil(log2(len(self.values) + 1)))

    def matrix(self, shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
        """Every entry's value."""
        return np.pad(self.values, (1, 0))[self.codes]

    def with_rows_scaled(self, scale: Float32[np.ndarray, " n"]) -> "Dense | Codebook":
        """Scale the values if all rows are scaled alike; otherwise there are too many of them."""
        if np.all(scale == scale[0]):
            return Codebook(self.values * scale[0], self.codes)
        return Dense(np.pad(self.values, (1, 0))[self.codes] * scale[:, None])

    def with_rows(self, kept: Int[np.ndarray, " k"]) -> "Codebook":
        """Take the rows."""
        return Codebook(self.values, self.codes[kept])

    def channels_read(self, shape: MatrixShape) -> Bool[np.ndarray, " c_in"]:
        """Those with an entry that is not zero."""
        return channels_of(np.any(np.pad(self.values, (1, 0))[self.codes], axis=0), shape.c_in)

    def with_channels(self, kept: Int[np.ndarray, " k"], shape: MatrixShape) -> "Codebook":
        """Take the columns."""
        return Codebook(self.values, self.codes[:, moved(np.arange(shape.p), kept, shape.c_in)[0]])


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

    def with_rows(self, kept: Int[np.ndarray, " k"]) -> "Columns | LowRank":
        """Take the rows of u: without gauge if one of its identity rows goes, and no factors for `rank` rows."""
        n = self.u.shape[0] + len(self.pivots)
        if len(kept) <= self.rank:
            return Columns(self.full_u(n)[kept] @ self.v, self.indices)
        if len(self.pivots) and np.isin(self.pivots, kept).all():
            others = np.setdiff1d(np.arange(n), self.pivots)
            pivots = np.searchsorted(kept, self.pivots).astype(np.int32)
            return LowRank(self.u[np.isin(others, kept)], self.v, self.indices, pivots)
        u = self.full_u(n)[kept]
        live = u.any(axis=0)
        used = self.v[live].any(axis=0)
        return LowRank(u[:, live], self.v[live][:, used], self.indices[used])

    def channels_read(self, shape: MatrixShape) -> Bool[np.ndarray, " c_in"]:
        """Those with a column of v that is not zero."""
        return Columns(self.v, self.indices).channels_read(shape)

    def with_channels(self, kept: Int[np.ndarray, " k"], shape: MatrixShape) -> "LowRank":
        """Number the columns of v anew."""
        v = Columns(self.v, self.indices).with_channels(kept, shape)
        return LowRank(self.u, v.values, v.indices, self.pivots)


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

    def with_rows(self, kept: Int[np.ndarray, " k"]) -> "Spatial":
        """Take the rows of the second factor; without gauge if a channel between the two is useless then."""
        second = self.second[kept]
        live = second.any(axis=(0, 1))
        if live.all():
            return Spatial(self.first, second, self.pivots)
        return Spatial(self.full_first(self.first.shape[1] + len(self.pivots))[live], second[:, :, live])

    def channels_read(self, shape: MatrixShape) -> Bool[np.ndarray, " c_in"]:
        """Those with a column of the first factor that is not zero."""
        first = self.full_first(shape.window[1] * shape.c_in)
        return channels_of(np.any(first, axis=0), shape.c_in)

    def with_channels(self, kept: Int[np.ndarray, " k"], shape: MatrixShape) -> "Spatial":
        """Take the columns of the first factor."""
        others = np.setdiff1d(np.arange(shape.window[1] * shape.c_in), self.pivots)
        here = moved(others, kept, shape.c_in)[0]
        return Spatial(self.first[:, here], self.second, moved(self.pivots, kept, shape.c_in)[1])


def total_matrix(terms: Sequence[Term], shape: MatrixShape) -> Float32[np.ndarray, "n p"]:
    """The sum of the terms' matrices; zero without terms."""
    out = np.zeros((shape.n, shape.p), np.float32)
    for term in terms:
        out += term.matrix(shape)
    return out


def figures(terms: Sequence[Term], shape: MatrixShape) -> dict[str, int]:
    """Stored values `params`, their `index_bits`, `kept_columns` of the sparse part, `rank` of the factored parts."""
    return {
        "params": sum(t.num_params for t in terms),
        "index_bits": sum(t.index_bits(shape) for t in terms),
        "kept_columns": sum(len(t.indices) for t in terms if isinstance(t, Columns)),
        "rank": sum(getattr(t, "rank", 0) for t in terms),
    }
