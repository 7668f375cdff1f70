"""Pruning of structures: columns, rows or input channels of a matrix; N of every M neighbours."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from solvers.compressions.base import FLOAT_BITS, Compression, is_smaller
from solvers.compressions.bits import Bits, Reader, width_of, write_bits, write_floats
from solvers.compressions.checks import check_amount, check_count, check_matrix, check_weight, count_of
from solvers.prox import CHANNELS, COLUMNS, ROWS, Grouping, channels, group_soft_threshold, project_groups
from solvers.terms import Columns, MatrixShape, Term

Matrix = Float[Array, "n p"]


def _within(grouping: Grouping, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Grouping:
    """The grouping with the number of input channels that only the layer knows.

    Raises:
        ValueError: weights that are no matrix of one layer.
    """
    check_matrix(f"pruning of {grouping.name}", target, layers)
    if grouping != CHANNELS:
        return grouping
    return channels(layers[0].c_in)


class _Grouped(Compression):
    """Theta is the matrix with whole groups of zeros, which are not stored."""

    grouping: Grouping

    def decompress(self, theta: Matrix) -> Matrix:
        """As it is."""
        return theta

    def _kept(self, theta: Matrix) -> Bool[np.ndarray, " groups"]:
        return np.asarray(self.grouping.norms(theta)) > 0

    def _inside(self, kept: Bool[np.ndarray, " groups"], shape: tuple[int, ...]) -> Bool[np.ndarray, "n p"]:
        return np.asarray(self.grouping.expand(jnp.asarray(kept), shape))

    def bits(self, theta: Matrix) -> int:
        """A bit for every group, and all values of those that stay."""
        kept = self._kept(theta)
        return kept.size + FLOAT_BITS * int(kept.sum()) * (theta.size // kept.size)

    def encode(self, theta: Matrix) -> Bits:
        """The bits of the groups, then the values."""
        kept = self._kept(theta)
        values = np.asarray(theta)[self._inside(kept, theta.shape)]
        return np.concatenate([write_bits(kept, 1), write_floats(values)])

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Matrix:
        """See `Compression.decode`."""
        values = np.zeros(shape, np.float32)
        inside = self._inside(reader.integers(self.grouping.count(shape), 1).astype(bool), shape)
        values[inside] = reader.floats(int(inside.sum()))
        return jnp.asarray(values)

    def terms(self, theta: Matrix, shape: MatrixShape) -> tuple[Term, ...] | None:
        """The columns that stay; None for rows, which a sum of terms has no form for."""
        if self.grouping == ROWS:
            return None
        values = np.asarray(theta, np.float32)
        indices = np.flatnonzero(values.any(axis=0)).astype(np.int32)
        terms = (Columns(values[:, indices], indices),)
        return terms if is_smaller(terms, shape) else None

    def info(self, theta: Matrix) -> dict[str, Any]:
        """How many groups stay."""
        return {self.grouping.name: int(self._kept(theta).sum())}


@dataclass(frozen=True)
class PruneGroups(_Grouped):
    """At most `kappa` columns, rows or input channels of a matrix: those of largest norm.

    Attributes:
        kappa: how many groups stay: a whole number, or a fraction up to 1.0 of all.
        grouping: `solvers.prox.COLUMNS`, `ROWS` or `CHANNELS`.
    """

    word: ClassVar = "prune_groups"
    kappa: int | float
    grouping: Grouping = COLUMNS

    def __post_init__(self) -> None:
        check_amount("kappa", self.kappa, self.grouping.name)

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`."""
        grouping = _within(self.grouping, target, layers)
        kappa = count_of("kappa", self.kappa, grouping.count(target.shape), grouping.name)
        return replace(self, kappa=kappa, grouping=grouping)

    def compress(self, target: Matrix, mu: Float[ArrayLike, ""], start: Matrix | None = None) -> Matrix:
        """See `Compression.compress`."""
        kappa = count_of("kappa", self.kappa, self.grouping.count(target.shape), self.grouping.name)
        return project_groups(target, kappa, self.grouping)


@dataclass(frozen=True)
class PenaltyGroups(_Grouped):
    """alpha sum_g ||w_g||: the l2,1 norm for columns, the sparse part of the paper's split.

    Attributes:
        alpha: weight of the norm.
        grouping: `solvers.prox.COLUMNS`, `ROWS` or `CHANNELS`.
    """

    word: ClassVar = "penalty_groups"
    alpha: float
    grouping: Grouping = COLUMNS

    def __post_init__(self) -> None:
        check_weight("alpha", self.alpha)

    def bind(self, target: Float[Array, "..."], layers: tuple[MatrixShape, ...]) -> Compression:
        """See `Compression.bind`."""
        grouping = _within(self.grouping, target, layers)
        grouping.count(target.shape)
        return replace(self, grouping=grouping)

    def compress(self, target: Matrix, mu: Float[ArrayLike, ""], start: Matrix | None = None) -> Matrix:
        """See `Compression.compress`; nothing stays at mu = 0 and alpha > 0."""
        mu = jnp.asarray(mu, target.dtype)
        shrunk = group_soft_threshold(target, self.alpha / jnp.where(mu > 0, mu, 1), self.grouping)
        return jnp.where((mu > 0) | (self.alpha == 0), shrunk, 0)

    def penalty(self, theta: Matrix) -> Float[Array, ""]:
        """Alpha times the sum of the groups' norms."""
        return self.alpha * jnp.sum(self.grouping.norms(theta))


@dataclass(frozen=True)
class PruneNofM(Compression):
    """`n` of every `m` neighbours along the last axis: the largest, as sparse tensor cores take them.

    Attributes:
        n: weights that stay.
        m: neighbours.
    """

    word: ClassVar = "n_of_m"
    n: int
    m: int

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            check_count(name, getattr(self, name))
        if self.n > self.m:
            raise ValueError(f"n, m: {self.n} of {self.m}; give 0 < n <= m, for example 2 of 4")

    def compress(
        self, target: Float[Array, "..."], mu: Float[ArrayLike, ""], start: Float[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """See `Compression.compress`; theta is the pruned weights."""
        if target.shape[-1] % self.m:
            raise ValueError(f"m: {self.m} does not divide the last axis of {target.shape}")
        blocks = target.reshape(-1, self.m)
        order = jnp.argsort(-jnp.abs(blocks), axis=1, stable=True)
        rank = jnp.argsort(order, axis=1)
        return jnp.where(rank < self.n, blocks, 0).reshape(target.shape)

    def decompress(self, theta: Float[Array, "..."]) -> Float[Array, "..."]:
        """As they are."""
        return theta

    def bits(self, theta: Float[Array, "..."]) -> int:
        """For each block n places within it and n values."""
        return theta.size // self.m * self.n * (width_of(self.m) + FLOAT_BITS)

    def encode(self, theta: Float[Array, "..."]) -> Bits:
        """All places, then all values."""
        blocks = np.asarray(theta).reshape(-1, self.m)
        places = np.sort(np.argsort(blocks == 0, axis=1, kind="stable")[:, : self.n], axis=1)
        values = np.take_along_axis(blocks, places, axis=1)
        return np.concatenate([write_bits(places, width_of(self.m)), write_floats(values)])

    def decode(self, reader: Reader, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """See `Compression.decode`."""
        blocks = np.zeros((int(np.prod(shape)) // self.m, self.m), np.float32)
        stored = len(blocks) * self.n
        places = reader.integers(stored, width_of(self.m)).reshape(-1, self.n)
        np.put_along_axis(blocks, places, reader.floats(stored).reshape(-1, self.n), axis=1)
        return jnp.asarray(blocks.reshape(shape))
