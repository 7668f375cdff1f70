"""What goes into and comes out of `solvers.admm`: options, state, history, status and solution."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from solvers.m_step import MajorizeMinimize, MStep
from solvers.penalties import Proximal
from solvers.penalty_parameter import PenaltyRule


class Status(IntEnum):
    """Where a solve stands."""

    RUNNING = 0
    CONVERGED = 1
    MAX_STEPS = 2
    DIVERGED = 3


_MESSAGES = {
    Status.RUNNING: "still running: drive it further with step()",
    Status.CONVERGED: "converged: both relative residuals are within the tolerance",
    Status.MAX_STEPS: (
        "stopped at max_steps before the residuals were within the tolerance; the best iterate is returned. Raise "
        "max_steps, loosen rtol, or start from a nearby solution"
    ),
    Status.DIVERGED: (
        "a non-finite value appeared. Check the data for NaN, Inf or entries near the float limit; with Sgd lower the "
        "learning rate; otherwise set over_relaxation=1 and momentum=0"
    ),
}


def message(status: int | Int[Array, ""]) -> str:
    """What a status means, with causes and cures."""
    return _MESSAGES[Status(int(status))]


class StepInfo(NamedTuple):
    """What the `on_step` callback gets: scalars after a step. `objective` is the last judged one."""

    num_steps: Int[Array, ""]
    objective: Float[Array, ""]
    primal_residual: Float[Array, ""]
    dual_residual: Float[Array, ""]
    num_kept: Int[Array, ""]
    rank: Int[Array, ""]
    t: Float[Array, ""]


@dataclass(frozen=True, kw_only=True)
class AdmmOptions:
    """Static options of a solve: each distinct value compiles anew, so what is swept is not here.

    Attributes:
        m_step: solver of the M step.
        splitting: "three_block" (the paper's: a, b, m in turn; fewer steps wherever it was measured) or "two_block"
            ((a, b) together, then m = m1 + m2 with a = m1, b = m2; proved to converge for every t > 0 where the
            problem is convex).
        over_relaxation: in (0, 2); 1 is plain ADMM.
        tau: where t starts, in units of tr(x'x) / (p ||y||^2); None takes the penalty's default.
        rule: how t moves; None takes the penalty's default.
        rtol: tolerance on both relative residuals.
        max_steps: length of the history.
        check_every: the feasible point a + b is judged, and convergence decided, every that many steps and at the
            last. Judging costs half a pass over the data.
        scale_columns: solve in features of equal energy; the penalties then act on a D and b D (see
            `solvers.reconstruction.scale_features`). Copies x.
        on_step: called on the host after every step with a `StepInfo`. Use a module-level function.
    """

    m_step: MStep = field(default_factory=MajorizeMinimize)
    splitting: Literal["three_block", "two_block"] = "three_block"
    over_relaxation: float = 1.0
    tau: float | None = None
    rule: PenaltyRule | None = None
    rtol: float = 5e-4
    max_steps: int = 300
    check_every: int = 10
    scale_columns: bool = False
    on_step: Callable[[StepInfo], None] | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        if self.splitting not in ("three_block", "two_block"):
            raise ValueError(f"splitting={self.splitting!r}: pass 'three_block' or 'two_block'")
        if not 0 < self.over_relaxation < 2:
            raise ValueError(f"over_relaxation={self.over_relaxation}: pass a value in (0, 2)")
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"tau={self.tau}: pass a positive number or None")
        if not self.rtol >= 0:
            raise ValueError(f"rtol={self.rtol}: pass a number >= 0")
        for name in ("max_steps", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: pass at least 1")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """One entry per step, NaN after the last. `objective` is NaN also at steps that were not judged.

    Attributes:
        objective: loss + penalty at the feasible point a + b.
        primal_residual: relative.
        dual_residual: relative.
        num_kept: non-zero groups of a.
        rank: of b.
    """

    objective: Float[Array, "..."]
    primal_residual: Float[Array, "..."]
    dual_residual: Float[Array, "..."]
    num_kept: Float[Array, "..."]
    rank: Float[Array, "..."]

    @classmethod
    def empty(cls, max_steps: int, dtype: Any) -> "History":
        """All NaN."""
        return cls(*(jnp.full((max_steps,), jnp.nan, dtype) for _ in range(5)))


class Best(NamedTuple):
    """The best judged point: objective infinite and point the start before the first."""

    sparse: Proximal
    low_rank: Proximal
    objective: Float[Array, ""]


class Prepared(NamedTuple):
    """What is computed once per problem.

    Attributes:
        inner: what the M step prepared.
        curvature: tr(x'x) / (p ||y||^2), mean eigenvalue of the loss's curvature.
    """

    inner: Any
    curvature: Float[Array, ""]


class AdmmState(NamedTuple):
    """The loop's carry; structure, shapes and dtypes are the same after every step.

    Attributes:
        sparse: a, its penalty and its non-zero groups.
        low_rank: b, its penalty and its non-zero singular directions.
        inner: the M step's state; `inner.m` is m.
        sparse_share: m1, what a is drawn to: m - b in three blocks.
        dual: the unscaled multiplier of a + b = m; it estimates the gradient of the loss.
        t: penalty parameter.
        primal_residual: ||a + b - m|| / max(||m||, ||a + b||).
        dual_residual: ||(t (v_a - a) + dual, t (v_b - b) + dual)|| / (sqrt(2) ||dual||), with v_a and v_b what the
            proximal steps were applied to: the distance of 0 from d g1(a) + dual and d g2(b) + dual, the first
            two stationarity conditions (the third, dual = gradient of the loss at m, is the M step's). In both
            residuals the denominator is at least 1e-3 of its natural size, so that zero solutions converge.
        objective: at a + b, when last judged.
        best: the best judged point.
        reference_kept: groups kept when the rule for t last looked.
        num_changes: how often t was changed.
        num_steps: steps taken.
        status: a `Status`.
        history: the trace.
    """

    sparse: Proximal
    low_rank: Proximal
    inner: Any
    sparse_share: Float[Array, "n p"]
    dual: Float[Array, "n p"]
    t: Float[Array, ""]
    primal_residual: Float[Array, ""]
    dual_residual: Float[Array, ""]
    objective: Float[Array, ""]
    best: Best
    reference_kept: Bool[Array, " groups"]
    num_changes: Int[Array, ""]
    num_steps: Int[Array, ""]
    status: Int[Array, ""]
    history: History


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AdmmSolution:
    """Result of a solve. Under vmap, and from `path`, every field has one more leading axis.

    Attributes:
        sparse: a, of the best judged iterate.
        low_rank: b, of the same iterate.
        split: m at the end.
        dual: multiplier at the end, unscaled.
        t: penalty parameter at the end.
        objective: loss + penalty at sparse + low_rank.
        primal_residual: relative, at the end.
        dual_residual: relative, at the end.
        status: a `Status`; `message(status)` explains it.
        num_steps: steps taken.
        history: the trace.
        kept: non-zero groups of `sparse`.
        rank: of `low_rank`.
    """

    sparse: Float[Array, "*batch n p"]
    low_rank: Float[Array, "*batch n p"]
    split: Float[Array, "*batch n p"]
    dual: Float[Array, "*batch n p"]
    t: Float[Array, "*batch"]
    objective: Float[Array, "*batch"]
    primal_residual: Float[Array, "*batch"]
    dual_residual: Float[Array, "*batch"]
    status: Int[Array, "*batch"]
    num_steps: Int[Array, "*batch"]
    history: History
    kept: Bool[Array, "*batch groups"]
    rank: Int[Array, "*batch"]


def require_converged(solution: AdmmSolution) -> AdmmSolution:
    """The solution itself, if it converged.

    Raises:
        RuntimeError: it did not; the text says why, and what to do.
    """
    for status in jnp.ravel(solution.status):
        if int(status) != Status.CONVERGED:
            raise RuntimeError(f"the solve ended with status {Status(int(status)).name}: {message(status)}")
    return solution
