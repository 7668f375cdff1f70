"""The M step of the alternation: pull m towards a + b and towards the layer's response, behind one protocol.

    argmin_m  L(m) + t/2 ||m - target||_F^2,    L the loss of `solvers.reconstruction`

approximately, from where the last step ended. `MajorizeMinimize` needs no learning rate and one pass over the data;
`Sgd` is the paper's and takes any activation; `ExactLinear` needs no pass at all where there is no activation.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float, Int, Key

from solvers.activation import IDENTITY, RELU
from solvers.reconstruction import (
    LayerProblem,
    descent_residual,
    is_concrete,
    preactivation,
    sum_over_chunks,
    target_energy,
)

MAX_EIGEN_FEATURES = 8192  # beyond, an eigendecomposition takes longer than many Cholesky factorisations


@runtime_checkable
class MStepState(Protocol):
    """What an M step carries from call to call; shapes and dtypes never change."""

    @property
    def m(self) -> Float[Array, "n p"]:
        """The current m."""
        ...


@runtime_checkable
class MStep(Protocol):
    """A solver of the M step: a frozen, hashable dataclass, static under `jax.jit`."""

    def check(self, problem: LayerProblem) -> None:
        """Raises ValueError for a problem that it cannot solve, on the host, before any work."""
        ...

    def prepare(self, problem: LayerProblem) -> Any:
        """What is computed once per problem: factorisations, step sizes."""
        ...

    def init(
        self, problem: LayerProblem, prepared: Any, m: Float[Array, "n p"], key: Key[Array, ""], t: Float[Array, ""]
    ) -> Any:
        """The state to start from m; `t` only gives a first value to what depends on it."""
        ...

    def step(
        self, problem: LayerProblem, prepared: Any, state: Any, target: Float[Array, "n p"], t: Float[Array, ""]
    ) -> Any:
        """The state after one approximate minimisation."""
        ...


class Curvature(NamedTuple):
    """The quadratic part of the loss, scale_i x'x for output i, factorised or ready to be.

    Attributes:
        scale: weight of each output / energy of the target.
        values: eigenvalues of x'x, increasing, q = p of them, or q = d where rows are few and the others are zero; all
            zero with Cholesky.
        basis: their eigenvectors as columns; x'x itself with Cholesky.
    """

    scale: Float[Array, " n"]
    values: Float[Array, " q"]
    basis: Float[Array, "p q"]


class MajorizeState(NamedTuple):
    """State of `MajorizeMinimize`.

    Attributes:
        m: current point.
        z: its response x m' + bias + offset.
        previous_m: the point before.
        previous_z: its response.
        loss: L(m).
        num_steps: steps taken.
        factor: Cholesky factor at `factor_t`, (p, p); (0, 0) with the eigendecomposition.
        factor_t: the t it was made for.
    """

    m: Float[Array, "n p"]
    z: Float[Array, "d n"]
    previous_m: Float[Array, "n p"]
    previous_z: Float[Array, "d n"]
    loss: Float[Array, ""]
    num_steps: Int[Array, ""]
    factor: Float[Array, "q q"]
    factor_t: Float[Array, ""]


def _gram(problem: LayerProblem) -> Float[Array, "p p"]:
    return sum_over_chunks(lambda rows: jnp.matmul(rows.T, rows, precision="highest"), (problem.x,), mesh=problem.mesh)


def _output_scale(problem: LayerProblem) -> Float[Array, " n"]:
    weights = jnp.ones_like(problem.bias) if problem.weights is None else problem.weights
    return weights / target_energy(problem)


def _has_few_rows(problem: LayerProblem) -> bool:
    """Whether x'x is cheaper to decompose through the rows: d^3 and 2 p d^2 instead of 9 p^3."""
    d, p = problem.x.shape
    return problem.mesh is None and 2 * d <= p


def _eigen_curvature(problem: LayerProblem) -> Curvature:
    if _has_few_rows(problem):
        q, r = jnp.linalg.qr(problem.x.T)
        values, vectors = jnp.linalg.eigh(jnp.matmul(r, r.T, precision="highest"))
        basis = jnp.matmul(q, vectors, precision="highest")
    else:
        values, basis = jnp.linalg.eigh(_gram(problem))
    return Curvature(_output_scale(problem), jnp.maximum(values, 0), basis)


def _eigen_solve(curvature: Curvature, rhs: Float[Array, "n p"], t: Float[Array, ""]) -> Float[Array, "n p"]:
    """The rows d_i of the solution of d_i (scale_i x'x + t I) = rhs_i."""
    denominator = curvature.scale[:, None] * curvature.values[None, :] + t
    inside = rhs @ curvature.basis
    solved = (inside / jnp.where(denominator > 0, denominator, 1)) @ curvature.basis.T
    p, q = curvature.basis.shape
    if q == p:
        return solved
    return solved + (rhs - inside @ curvature.basis.T) / jnp.where(t > 0, t, 1)


@dataclass(frozen=True, kw_only=True)
class MajorizeMinimize:
    """Majorise-minimise: each step minimises a quadratic bound of the loss exactly, with x'x factorised once.

    With z the response at the expansion point and T as in `solvers.reconstruction.descent_residual`, the step solves

        m_i (scale_i x'x + t I) = scale_i (T - bias - offset)_i' x + t target_i

    in residual form (the correction to the expansion point), so that rounding in the factorisation slows the iteration
    but does not move its fixed points. The expansion point is m + momentum (m - previous m). T starts with "pull",
    which also draws outputs back that should be active and are not. That bound is convex but does not touch the loss
    there, so its fixed points are not the loss's: after `pull_steps` steps the exact ("tight") bound takes over. The
    value of L(m) + t/2 ||m - target||^2 is checked after every step (it comes free with the response that the next
    step needs): on a rise, which pull and momentum can cause, the step is repeated from m itself with the tight bound,
    which cannot rise. No activation: T = y, and one step is exact.

    A step costs two products with x, 4 d n p FLOPs, and 4 n p^2 for the solve, or 8 n p d where 2 d <= p. Memory beyond
    the problem: two (d, n) responses that are kept, up to three more as temporaries, and p^2 (p d) values.

    Attributes:
        momentum: in [0, 1).
        pull_steps: steps with pull before the tight bound. With 0, start from a matrix that already responds.
        factorization: "eigh" serves every t and per-output weights; "cholesky" is made again when t moves and takes
            the largest weight for all outputs (still a bound, a looser one); None chooses by p and d.
    """

    momentum: float = 0.7
    pull_steps: int = 20
    factorization: Literal["eigh", "cholesky"] | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: pass a value in [0, 1)")
        if self.pull_steps < 0:
            raise ValueError(f"pull_steps={self.pull_steps}: pass at least 0")
        if self.factorization not in (None, "eigh", "cholesky"):
            raise ValueError(f"factorization={self.factorization!r}: pass 'eigh', 'cholesky' or None")

    def check(self, problem: LayerProblem) -> None:
        """Raises ValueError for an activation other than ReLU or none, and for a negative target of a ReLU."""
        if problem.activation not in (RELU, IDENTITY):
            raise ValueError(
                f"activation={problem.activation.name!r} has no majoriser in MajorizeMinimize (relu and none have): "
                "use m_step=Sgd()"
            )
        if problem.activation == RELU and is_concrete(problem.y) and np.min(problem.y) < 0:
            raise ValueError(f"y has the negative entry {np.min(problem.y)}: a ReLU's target must be >= 0, clip it")

    def prepare(self, problem: LayerProblem) -> Curvature:
        """Factorises x'x, or only computes it for Cholesky."""
        if self._uses_eigh(problem):
            return _eigen_curvature(problem)
        return Curvature(_output_scale(problem), jnp.zeros_like(problem.x[0]), _gram(problem))

    def init(
        self,
        problem: LayerProblem,
        prepared: Curvature,
        m: Float[Array, "n p"],
        key: Key[Array, ""],
        t: Float[Array, ""],
    ) -> MajorizeState:
        """At m, at rest."""
        z, loss = self._evaluate(problem, prepared, m)
        factor = jnp.zeros((0, 0), m.dtype) if self._uses_eigh(problem) else self._factorize(prepared, t)
        return MajorizeState(m, z, m, z, loss, jnp.zeros((), jnp.int32), factor, t)

    def step(
        self,
        problem: LayerProblem,
        prepared: Curvature,
        state: MajorizeState,
        target: Float[Array, "n p"],
        t: Float[Array, ""],
    ) -> MajorizeState:
        """One step with momentum, repeated without it and with the tight majoriser if the objective rose."""
        if not self._uses_eigh(problem):
            factor = lax.cond(t == state.factor_t, lambda: state.factor, lambda: self._factorize(prepared, t))
            state = state._replace(factor=factor, factor_t=t)

        def objective(m: Array, loss: Array) -> Array:
            return loss + t / 2 * jnp.sum((m - target) ** 2)

        def attempt(m: Array, z: Array, pull: bool | Array) -> tuple[Array, Array, Array]:
            residual = descent_residual(problem.activation, problem.y, z, pull)
            rhs = prepared.scale[:, None] * (residual.T @ problem.x) + t * (target - m)
            new = m + self._solve(prepared, state.factor, rhs, t)
            return new, *self._evaluate(problem, prepared, new)

        beta = self.momentum
        ahead_m = state.m + beta * (state.m - state.previous_m)
        ahead_z = state.z + beta * (state.z - state.previous_z)
        new = attempt(ahead_m, ahead_z, state.num_steps < self.pull_steps)
        before = objective(state.m, state.loss)
        # Sums of d n terms carry rounding: only a rise beyond it counts.
        slack = 100 * jnp.finfo(before.dtype).eps * before
        rose = objective(new[0], new[2]) > before + slack
        new = lax.cond(rose, lambda: attempt(state.m, state.z, False), lambda: new)
        m, z, loss = new
        return state._replace(
            m=m, z=z, previous_m=state.m, previous_z=state.z, loss=loss, num_steps=state.num_steps + 1
        )

    def _uses_eigh(self, problem: LayerProblem) -> bool:
        cheap = problem.x.shape[1] <= MAX_EIGEN_FEATURES or _has_few_rows(problem)
        choice = self.factorization or ("eigh" if cheap else "cholesky")
        return choice == "eigh"

    def _evaluate(self, problem: LayerProblem, prepared: Curvature, m: Array) -> tuple[Array, Array]:
        z = preactivation(problem.x, m, problem.bias, problem.offset)
        gap = problem.y - problem.activation(z)
        return z, 0.5 * jnp.sum(prepared.scale * jnp.sum(gap * gap, axis=0))

    def _factorize(self, prepared: Curvature, t: Array) -> Array:
        gram = jnp.max(prepared.scale) * prepared.basis
        return jnp.linalg.cholesky(gram + t * jnp.eye(gram.shape[0], dtype=gram.dtype))

    def _solve(self, prepared: Curvature, factor: Array, rhs: Array, t: Array) -> Array:
        return cho_solve((factor, True), rhs.T).T if factor.size else _eigen_solve(prepared, rhs, t)


class LinearStatistics(NamedTuple):
    """What `ExactLinear` keeps of the data.

    Attributes:
        curvature: x'x in its eigenbasis.
        cross: scale_i (y - bias - offset)_i' x.
    """

    curvature: Curvature
    cross: Float[Array, "n p"]


class LinearState(NamedTuple):
    """State of `ExactLinear`: the current m."""

    m: Float[Array, "n p"]


@dataclass(frozen=True)
class ExactLinear:
    """The exact M step of a layer without activation: m_i (scale_i x'x + t I) = cross_i + t target_i, 4 n p^2 FLOPs.

    The data are read once. In float32 the Gram matrix limits the accuracy of m to about eps times its condition number;
    `MajorizeMinimize` is exact too and corrects that at the price of a pass per step.
    """

    def check(self, problem: LayerProblem) -> None:
        """Raises ValueError where there is an activation."""
        if problem.activation != IDENTITY:
            raise ValueError(
                f"activation={problem.activation.name!r}: ExactLinear is for layers without one; use "
                "MajorizeMinimize (relu) or Sgd (any)"
            )

    def prepare(self, problem: LayerProblem) -> LinearStatistics:
        """Gram matrix, its eigenvectors and the cross term."""
        curvature = _eigen_curvature(problem)

        def body(x: Array, y: Array, offset: Array | None) -> Array:
            shifted = y - problem.bias[None, :]
            return (shifted if offset is None else shifted - offset).T @ x

        cross = sum_over_chunks(body, (problem.x, problem.y, problem.offset), mesh=problem.mesh)
        return LinearStatistics(curvature, curvature.scale[:, None] * cross)

    def init(
        self,
        problem: LayerProblem,
        prepared: LinearStatistics,
        m: Float[Array, "n p"],
        key: Key[Array, ""],
        t: Float[Array, ""],
    ) -> LinearState:
        """At m."""
        return LinearState(m)

    def step(
        self,
        problem: LayerProblem,
        prepared: LinearStatistics,
        state: LinearState,
        target: Float[Array, "n p"],
        t: Float[Array, ""],
    ) -> LinearState:
        """The exact minimiser."""
        return LinearState(_eigen_solve(prepared.curvature, prepared.cross + t * target, t))
