"""Variational Bayesian matrix factorisation: how much of a matrix is signal, by the global analytic solution.

The model is y = b a' + noise, the noise of variance s2 in every entry, the columns of a (M, H) and b (L, H) normal with
variances ca2 and cb2, their posteriors independent of each other. What minimises the free energy then shrinks the
singular values of y one by one, and drops those below a threshold:

    `vbmf`    the product ca cb is given, the same for all components.
    `evbmf`   the prior's variances are estimated too (empirical Bayes): the number of components follows from the data.

Nakajima, Sugiyama, Babacan & Tomioka, Global analytic solution of fully-observed variational Bayesian matrix
factorization, JMLR 14 (2013): Theorems 1, 2 and 4, Corollary 1. Only the eigenvectors of the smaller Gram matrix are
formed: beside the matrix itself, memory is min(L, M)^2. Everything is float64; singular values below 3e-8 of the
largest are rounding.

Differs from the paper: the noise is searched on a grid over all of its bounds, refined around the best point, because
the free energy has several minima in it; the threshold of `evbmf` is solved for, not read off the approximation
2.5129 sqrt(L / M).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import isfinite, log1p, pi, sqrt

import numpy as np
from jaxtyping import Array, Float, Float64
from scipy.optimize import brentq, minimize_scalar

_GRID = 400  # trial values of the noise between its bounds
_ROUNDING = 1e-15  # of the largest eigenvalue of the Gram matrix


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """The factorisation of least free energy: its mean is `u * values @ v`.

    Attributes:
        u: (L, rank), orthonormal columns.
        values: (rank,), the shrunk singular values, decreasing.
        v: (rank, M), orthonormal rows.
        noise: variance of an entry's noise, as given or estimated.
        free_energy: minus the bound on the log evidence, in nats; -inf for a matrix of zeros without given noise.
        priors: (rank,), ca cb of each component.
        row_variances: (rank,), posterior variance of each entry of b's column, in the scale in which ca = cb.
        column_variances: (rank,), likewise of a's column.
    """

    u: Float64[np.ndarray, "L rank"]
    values: Float64[np.ndarray, " rank"]
    v: Float64[np.ndarray, "rank M"]
    noise: float
    free_energy: float
    priors: Float64[np.ndarray, " rank"]
    row_variances: Float64[np.ndarray, " rank"]
    column_variances: Float64[np.ndarray, " rank"]

    @property
    def rank(self) -> int:
        """Components that are not zero."""
        return len(self.values)

    def mean(self) -> Float64[np.ndarray, "L M"]:
        """The posterior mean of b a'."""
        return (self.u * self.values) @ self.v


@dataclass(frozen=True)
class _Sizes:
    """L <= M, and the singular values of the matrix, decreasing, of which the first `most` may be signal."""

    rows: int
    columns: int
    singular: Float64[np.ndarray, " L"]
    most: int

    @property
    def ratio(self) -> float:
        return self.rows / self.columns

    @property
    def allowed(self) -> Float64[np.ndarray, " most"]:
        return self.singular[: self.most]

    @property
    def energy(self) -> float:
        return float(np.sum(self.singular**2))


@dataclass(frozen=True)
class _Components:
    """What either theorem says of the components, the largest first."""

    values: Float64[np.ndarray, " rank"]
    priors: Float64[np.ndarray, " rank"]
    free_energy: float


def evbmf(y: Float[np.ndarray | Array, "L M"], noise: float | None = None, *, max_rank: int | None = None) -> Posterior:
    """Empirical variational Bayesian matrix factorisation: the prior of each component is estimated (Theorem 4).

    Args:
        y: any orientation.
        noise: variance of an entry's noise; None: estimated (Corollary 1 and the bounds of section 4.3).
        max_rank: components allowed, min(L, M) when None.

    Raises:
        ValueError: y is empty or not finite, a noise that is not positive, max_rank outside [1, min(L, M)].
    """
    return _solve(y, noise, max_rank, _evb_energy, _evb_components, 0.0)


def vbmf(
    y: Float[np.ndarray | Array, "L M"], prior: float, noise: float | None = None, *, max_rank: int | None = None
) -> Posterior:
    """Variational Bayesian matrix factorisation with the product ca cb of all priors given (Theorems 1 and 2).

    Args:
        y: any orientation.
        prior: ca cb; the larger, the less is shrunk.
        noise: variance of an entry's noise; None: estimated.
        max_rank: components allowed, min(L, M) when None.

    Raises:
        ValueError: as `evbmf`; a prior that is not positive.
    """
    if not (isfinite(prior) and prior > 0):
        raise ValueError(f"prior: {prior!r} is not a positive number; it is the product ca cb of the priors' widths")
    return _solve(
        y,
        noise,
        max_rank,
        lambda sizes, trials: _vb_energy(sizes, trials, prior),
        lambda sizes, found: _vb_components(sizes, found, prior),
        min(np.shape(y)) * prior**2,
    )


def _solve(
    y: Float[np.ndarray | Array, "L M"],
    noise: float | None,
    max_rank: int | None,
    energies: Callable[[_Sizes, np.ndarray], np.ndarray],
    components: Callable[[_Sizes, float], _Components],
    spread: float,
) -> Posterior:
    matrix = _checked(y, noise, max_rank)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values, vectors = np.linalg.eigh(wide @ wide.T)
    squares = np.maximum(values[::-1], _ROUNDING * max(values[-1], 0.0))
    rows, columns = wide.shape
    sizes = _Sizes(rows, columns, np.sqrt(squares), max_rank or rows)
    if noise is None and not values[-1] > 0:
        found, noise = _Components(np.zeros(0), np.zeros(0), -np.inf), 0.0
    else:
        noise = _best_noise(sizes, energies, spread) if noise is None else noise
        found = components(sizes, noise)
    rank = len(found.values)
    u = vectors[:, ::-1][:, :rank]
    v = (u.T @ wide) / sizes.singular[:rank, None]
    row, column = _variances(sizes, found, noise)
    if wide is not matrix:
        u, v, row, column = v.T, u.T, column, row
    return Posterior(
        u=u,
        values=found.values,
        v=v,
        noise=noise,
        free_energy=found.free_energy,
        priors=found.priors,
        row_variances=row,
        column_variances=column,
    )


def _checked(
    y: Float[np.ndarray | Array, "L M"], noise: float | None, max_rank: int | None
) -> Float64[np.ndarray, "L M"]:
    matrix = np.asarray(y, np.float64)
    if not matrix.size or not np.isfinite(matrix).all():
        raise ValueError(f"y: {matrix.shape}, empty or with NaN or infinite values; give a finite matrix")
    if noise is not None and not (isfinite(noise) and noise > 0):
        raise ValueError(f"noise: {noise!r} is not a positive variance; give one, or None to estimate it")
    if max_rank is not None and not 1 <= max_rank <= min(matrix.shape):
        raise ValueError(f"max_rank: {max_rank} of a {matrix.shape} matrix; give 1 to {min(matrix.shape)}")
    return matrix


def _best_noise(sizes: _Sizes, energies: Callable[[_Sizes, np.ndarray], np.ndarray], spread: float) -> float:
    """The noise of least free energy.

    It is at most the mean energy of an entry plus what the posteriors of components of zero mean hold, `spread`, and
    not far below the energy of the last singular value.
    """
    highest = sizes.energy / (sizes.rows * sizes.columns) + spread
    lowest = max(1e-3 * float(sizes.singular[-1] ** 2) / sizes.columns, _ROUNDING * highest)
    trials = np.geomspace(lowest, highest, _GRID)
    best = int(np.argmin(energies(sizes, trials)))
    around = np.log(trials[[max(best - 1, 0), min(best + 1, _GRID - 1)]])

    def at(logarithm: float) -> float:
        return float(energies(sizes, np.exp([logarithm]))[0])

    found = minimize_scalar(at, bounds=tuple(around), method="bounded", options={"xatol": 1e-10})
    return float(np.exp(found.x)) if found.fun <= at(np.log(trials[best])) else float(trials[best])


def _shared_energy(sizes: _Sizes, noises: Float64[np.ndarray, " trials"]) -> Float64[np.ndarray, " trials"]:
    """The free energy when nothing is signal, but for what the components of zero mean add."""
    return 0.5 * (sizes.rows * sizes.columns * np.log(2 * pi * noises) + sizes.energy / noises)


@cache
def _evb_threshold(ratio: float) -> float:
    """x above which a component pays, x = singular^2 / (M noise): its t solves log(1 + t) + a log(1 + t/a) = t."""
    end = brentq(lambda t: log1p(t) + ratio * log1p(t / ratio) - t, sqrt(ratio), 10.0)
    assert isinstance(end, float)
    return (1 + end) * (1 + ratio / end)


def _evb_strength(x: Float64[np.ndarray, "..."], ratio: float) -> Float64[np.ndarray, "..."]:
    """T = singular * shrunk / (M noise) of components above the threshold, 0 below (Theorem 4)."""
    mean = x - (1 + ratio)
    found = 0.5 * (mean + np.sqrt(np.maximum(mean**2 - 4 * ratio, 0)))
    return np.where(x > _evb_threshold(ratio), found, 0.0)


def _evb_energy(sizes: _Sizes, noises: Float64[np.ndarray, " trials"]) -> Float64[np.ndarray, " trials"]:
    """Free energy for each noise."""
    t = _evb_strength(sizes.allowed**2 / (sizes.columns * noises[:, None]), sizes.ratio)
    gains = np.log1p(t) + sizes.ratio * np.log1p(t / sizes.ratio) - t
    return _shared_energy(sizes, noises) + 0.5 * sizes.columns * gains.sum(axis=1)


def _evb_components(sizes: _Sizes, noise: float) -> _Components:
    scale = sizes.columns * noise
    t = _evb_strength(sizes.allowed**2 / scale, sizes.ratio)
    t = t[t > 0]
    values = t * scale / sizes.singular[: len(t)]
    priors = np.sqrt(values * sizes.singular[: len(t)] / (sizes.rows * sizes.columns))
    energy = float(_evb_energy(sizes, np.asarray([noise]))[0])
    return _Components(values, priors, energy)


def _vb_values(
    singular: Float64[np.ndarray, "..."], sizes: _Sizes, noise: Float64[np.ndarray, "..."], prior: float
) -> Float64[np.ndarray, "..."]:
    """Shrunk singular values, 0 below the threshold (Theorem 2)."""
    total, gap = sizes.rows + sizes.columns, sizes.columns - sizes.rows
    extra = np.asarray(noise / prior**2)
    threshold = 0.5 * noise * (total + extra + _discriminant(sizes, extra))
    root = np.sqrt(gap**2 + 4 * singular**2 / prior**2)
    shrunk = singular - noise / (2 * singular) * (total + root)
    return np.where(singular**2 > threshold, shrunk, 0.0)


def _discriminant(sizes: _Sizes, extra: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """sqrt((L + M + extra)^2 - 4 L M), without cancellation."""
    gap, total = sizes.columns - sizes.rows, sizes.columns + sizes.rows
    return np.asarray(np.sqrt(gap**2 + 2 * total * extra + extra**2))


def _vb_energy(sizes: _Sizes, noises: Float64[np.ndarray, " trials"], prior: float) -> Float64[np.ndarray, " trials"]:
    """Free energy for each noise: components of zero mean have a posterior of their own, which costs something."""
    noise, singular = noises[:, None], sizes.allowed[None, :]
    values = _vb_values(singular, sizes, noise, prior)
    rows, columns = sizes.rows, sizes.columns
    # Posterior variances, ca = cb. Zero mean: the product z of both solves (s2 - L z)(s2 - M z) = z s2^2 / (ca cb)^2.
    # Of its roots the smaller, as 4 L M / (total + root): for narrow priors the difference of the two would be 0.
    extra = noise / prior**2
    both = rows + columns + extra + _discriminant(sizes, extra)
    product = 2 * noise / both
    zero_column = prior * (both - 2 * rows) / both
    on = values > 0
    ratio = _balance(singular, values, rows, noise, prior)
    column = np.where(on, ratio * noise / singular, zero_column)
    row = np.where(on, noise / (np.where(on, ratio, 1.0) * singular), product / zero_column)
    column_energy = np.where(on, values * ratio, 0.0) + columns * column
    row_energy = np.where(on, values / np.where(on, ratio, 1.0), 0.0) + rows * row
    each = (
        columns * np.log(prior / column)
        + rows * np.log(prior / row)
        + (column_energy + row_energy) / prior
        - (rows + columns)
        + (column_energy * row_energy - 2 * values * singular) / noise
    )
    return _shared_energy(sizes, noises) + 0.5 * each.sum(axis=1)


def _balance(
    singular: Float64[np.ndarray, "..."],
    values: Float64[np.ndarray, "..."],
    rows: int,
    noise: Float64[np.ndarray, "..."] | float,
    priors: Float64[np.ndarray, "..."] | float,
) -> Float64[np.ndarray, "..."]:
    """Length of a's column over that of b's, in the scale in which ca = cb; from the stationarity of either."""
    return priors / noise * (singular - values - rows * noise / singular)


def _vb_components(sizes: _Sizes, noise: float, prior: float) -> _Components:
    values = _vb_values(sizes.allowed, sizes, np.asarray(noise), prior)
    values = values[values > 0]
    energy = float(_vb_energy(sizes, np.asarray([noise]), prior)[0])
    return _Components(values, np.full(len(values), prior), energy)


def _variances(
    sizes: _Sizes, found: _Components, noise: float
) -> tuple[Float64[np.ndarray, " rank"], Float64[np.ndarray, " rank"]]:
    """Posterior variances of (b's, a's) columns."""
    singular = sizes.singular[: len(found.values)]
    ratio = _balance(singular, found.values, sizes.rows, noise, found.priors)
    return noise / (ratio * singular), ratio * noise / singular
