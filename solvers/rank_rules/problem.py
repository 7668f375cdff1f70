"""What a rule that chooses ranks may look at: one layer, the form it is to take, its costs, its spectra, its errors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from solvers.candidates import Context
from solvers.factor_sizes import Ranks, cost, full_ranks, mode_tails, tail
from solvers.forms import FORMS
from solvers.gram import GramStatistics, least_squares, linear_error
from solvers.layer import refit
from solvers.tensor_forms import whitened
from solvers.terms import MatrixShape

Trial = Callable[[Array, Array], float]


@dataclass(frozen=True, kw_only=True)
class RankProblem:
    """One layer that is to be factored, for the first time or again.

    Attributes:
        form: of `solvers.factor_sizes.FACTORED`.
        shape: of the layer.
        weights: (n, p), as they are now.
        positions: of each factor's output, in the order in which they run: multiply-adds per stored value.
        previous: the ranks it has now in that form, None if it is dense.
        statistics: of its rows and of the response it should keep, with a ridge; None: the weights alone.
        trial: (matrix, bias) -> points of accuracy that the network loses with these in place, and no training.
    """

    form: str
    shape: MatrixShape
    weights: Float[np.ndarray, "n p"]
    positions: tuple[float, ...]
    previous: Ranks | None = None
    statistics: GramStatistics | None = None
    trial: Trial | None = None

    @property
    def largest(self) -> Ranks:
        """The ranks at which nothing is lost: those it has, or the full ones."""
        return full_ranks(self.form, self.shape) if self.previous is None else self.previous

    def cost(self, ranks: Ranks, what: str) -> float:
        """`params` or `macs` (per example, a dense layer's at the last factor's positions) at these ranks."""
        return cost(self.form, self.shape, ranks, self.positions if what == "macs" else None)

    def dense_cost(self, what: str) -> float:
        """Of the layer before any compression."""
        return self.shape.n * self.shape.p * (self.positions[-1] if what == "macs" else 1.0)

    def current_cost(self, what: str) -> float:
        """Of the layer as it is."""
        return self.dense_cost(what) if self.previous is None else self.cost(self.previous, what)

    @cached_property
    def cores(self) -> tuple[Float64[np.ndarray, "_ _"], ...]:
        """The matrices whose ranks the form limits, one per rank, for CP those of outputs and of inputs.

        Of a factored layer what its factors leave is taken out first: the core of Tucker-2, the outer factor of a pair.
        In the whole matrix everything beyond the present ranks is exactly zero, which would look like no noise at all.
        """
        matrix = np.asarray(self.weights, np.float64)
        if self.form == "low_rank":
            return (_without_null_space(matrix, self.previous),)
        if self.form == "spatial":
            return (_without_null_space(matrix.reshape(self.shape.n * self.shape.window[0], -1), self.previous),)
        tensor = matrix.reshape(self.shape.n, -1, self.shape.c_in)
        if self.previous is not None:
            kept = self.previous if self.form == "tucker2" else 2 * self.previous
            outer, inner = (_basis(a, r) for a, r in zip(_unfoldings(tensor), kept, strict=True))
            tensor = np.einsum("osc,oa,cb->asb", tensor, outer, inner, optimize=True)
        return _unfoldings(tensor)

    @cached_property
    def tails(self) -> tuple[Float64[np.ndarray, " _"], ...]:
        """For each rank, the share of energy that is lost with 0, 1, ... directions: of the response, or the weights.

        For a low-rank pair exact; for Tucker-2 their sum bounds the loss from above (higher-order SVD). The Gram matrix
        counts in its Kronecker approximation, but for low rank. Not for CP.
        """
        found = self._tails()
        return tuple(t / t[0] if t[0] > 0 else t for t in found)

    def _tails(self) -> tuple[Float64[np.ndarray, " _"], ...]:
        n, window = self.shape.n, self.shape.window
        if self.form == "low_rank":
            return (self._matrix_tail(self._weighted(self.shape.p).reshape(n, -1)),)
        if self.form == "spatial":
            return (self._matrix_tail(self._weighted(window[1] * self.shape.c_in).reshape(n * window[0], -1)),)
        return mode_tails(self._weighted(self.shape.c_in))

    @staticmethod
    def _matrix_tail(matrix: Float64[np.ndarray, "_ _"]) -> Float64[np.ndarray, " _"]:
        small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        return tail(np.linalg.eigvalsh(small))

    def _weighted(self, q: int) -> Float64[np.ndarray, "n rows q"]:
        if self.statistics is None:
            return np.asarray(self.weights, np.float64).reshape(self.shape.n, -1, q)
        gram, w = self.statistics.gram, self._least_squares
        with jax.enable_x64(gram.dtype == np.float64):
            return np.asarray(whitened(gram, w, q), np.float64)

    @cached_property
    def _least_squares(self) -> Array:
        stats = self._needed_statistics()
        with jax.enable_x64(stats.gram.dtype == np.float64):
            return least_squares(stats)

    def fit(self, ranks: Ranks) -> tuple[Float[Array, "n p"], Float[Array, " n"]]:
        """Matrix and bias of least squared error of the linear response at these ranks, in float32.

        Raises:
            ValueError: there are no statistics.
        """
        stats = self._needed_statistics()
        with jax.enable_x64(stats.gram.dtype == np.float64):
            context = Context(stats=stats, w=self._least_squares, shape=self.shape, gauge=False, ranks=ranks)
            candidate = FORMS[self.form](context)
            assert candidate is not None
            return refit(candidate.structure, stats)

    def error(self, ranks: Ranks) -> float:
        """Relative squared error of the linear response at these ranks."""
        stats, (matrix, _) = self._needed_statistics(), self.fit(ranks)
        with jax.enable_x64(stats.gram.dtype == np.float64):
            return float(linear_error(stats, jnp.asarray(matrix, stats.gram.dtype)))

    def drop(self, ranks: Ranks) -> float:
        """Points of accuracy that the network loses with this layer alone at these ranks, untrained.

        Raises:
            ValueError: there is no network to try.
        """
        if self.trial is None:
            raise ValueError("trial: None; the loss of accuracy needs the network and labels")
        return self.trial(*self.fit(ranks))

    def _needed_statistics(self) -> GramStatistics:
        if self.statistics is None:
            raise ValueError("statistics: None; the error of the response needs the layer's rows")
        return self.statistics


def _unfoldings(
    tensor: Float64[np.ndarray, "a s b"],
) -> tuple[Float64[np.ndarray, "_ _"], Float64[np.ndarray, "_ _"]]:
    """Outputs by the rest, inputs by the rest."""
    return tensor.reshape(len(tensor), -1), np.moveaxis(tensor, -1, 0).reshape(tensor.shape[-1], -1)


def _basis(matrix: Float64[np.ndarray, "m rest"], rank: int) -> Float64[np.ndarray, "m rank"]:
    """The leading left singular vectors."""
    return np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1][:, :rank]


def _without_null_space(matrix: Float64[np.ndarray, "m k"], ranks: Ranks | None) -> Float64[np.ndarray, "m _"]:
    """The matrix in the basis of the rows that its factors have."""
    if ranks is None:
        return matrix
    if matrix.shape[0] > matrix.shape[1]:
        return matrix @ _basis(matrix.T, ranks[0])
    squares, vectors = np.linalg.eigh(matrix @ matrix.T)
    return (vectors * np.sqrt(np.maximum(squares, 0)))[:, ::-1][:, : ranks[0]]
