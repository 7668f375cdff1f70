"""How the penalty parameter t of ADMM starts and moves.

The multiplier is kept unscaled, so it stays as it is when t moves (only a scaled multiplier would be rescaled).
Each rule stops changing t after finitely many changes, so the theory of a constant t applies from there on.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from solvers.reconstruction import LayerProblem, sum_over_chunks, target_energy

STALL_STEPS = 40  # how far back a stall is looked for


class Progress(NamedTuple):
    """What a rule sees.

    Attributes:
        primal_residual: relative, as in the solver's state.
        dual_residual: relative, as in the solver's state.
        changed: fraction of the kept groups that differ from those at the last look.
        num_steps: steps taken.
        stalled: whether the larger residual fell by less than a fifth in the last `STALL_STEPS` steps.
    """

    primal_residual: Float[Array, ""]
    dual_residual: Float[Array, ""]
    changed: Float[Array, ""]
    num_steps: Int[Array, ""]
    stalled: Bool[Array, ""]


@runtime_checkable
class PenaltyRule(Protocol):
    """A hashable value that moves t every `every` steps, at most `max_changes` times."""

    @property
    def every(self) -> int:
        """Steps between two looks."""
        ...

    @property
    def max_changes(self) -> int:
        """After that many changes t is frozen."""
        ...

    def factor(self, progress: Progress) -> Float[Array, ""]:
        """What t is multiplied by, 1 for no change."""
        ...


@dataclass(frozen=True, kw_only=True)
class ResidualBalancing:
    """Keeps the two relative residuals within `ratio` of each other at first; later raises t where they stall.

    Boyd et al., "Distributed optimization and statistical learning via ADMM" (2011), equation 3.13, with relative
    residuals as in Wohlberg, "ADMM penalty parameter selection by residual balancing" (2017). With a ReLU the loss is
    not convex, and ADMM can circle for ever unless t outweighs its negative curvature, hence the second phase.

    Attributes:
        every: steps between two looks.
        ratio: t moves when one residual is more than this times the other.
        step: t is multiplied or divided by it.
        balance_steps: after that many steps t no longer balances, and only grows, where the residuals stall.
        max_changes: t is frozen after that many changes.
    """

    every: int = 10
    ratio: float = 3.0
    step: float = 2.0
    balance_steps: int = 100
    max_changes: int = 30

    def factor(self, progress: Progress) -> Float[Array, ""]:
        """`step` where the primal residual is too large or both circle, 1 / `step` where the dual one is too large."""
        primal, dual = progress.primal_residual, progress.dual_residual
        balances = progress.num_steps < self.balance_steps
        circles = progress.stalled & (self.ratio * primal > dual)
        up = jnp.where(balances, primal > self.ratio * dual, circles)
        down = balances & (dual > self.ratio * primal)
        return jnp.where(up, self.step, jnp.where(down, 1 / self.step, 1.0)).astype(primal.dtype)


@dataclass(frozen=True, kw_only=True)
class SupportGrowth:
    """Raises t with the change of the support, for projections on non-convex sets.

    Meng et al., "ALPS" (2024), section 3.2: fast growth while the support moves, slow growth near the end, none when it
    has settled.

    Attributes:
        every: steps between two looks.
        steps: what t is multiplied by after a large, a medium and a small change.
        thresholds: the changes (fractions of the kept groups) that count as large and as medium.
        max_changes: t is frozen after that many changes.
    """

    every: int = 3
    steps: tuple[float, float, float] = (1.1, 1.05, 1.02)
    thresholds: tuple[float, float] = (0.05, 0.0025)
    max_changes: int = 400

    def factor(self, progress: Progress) -> Float[Array, ""]:
        """One of `steps` by the size of the change, 1 where nothing changed."""
        changed = progress.changed
        large, medium, small = self.steps
        grown = jnp.where(changed > self.thresholds[0], large, jnp.where(changed > self.thresholds[1], medium, small))
        return jnp.where(changed > 0, grown, 1.0).astype(changed.dtype)


@dataclass(frozen=True)
class Constant:
    """Leaves t as it is."""

    every: int = 1
    max_changes: int = 0

    def factor(self, progress: Progress) -> Float[Array, ""]:
        """Always 1."""
        return jnp.ones_like(progress.primal_residual)


def mean_curvature(problem: LayerProblem) -> Float[Array, ""]:
    """tr(x'x) / (p ||y||^2), the mean eigenvalue of the loss's curvature: the natural unit of t. 1 where x is zero."""
    energy = jnp.sum(sum_over_chunks(lambda x: jnp.sum(x * x, axis=0), (problem.x,), mesh=problem.mesh))
    weight = 1 if problem.weights is None else jnp.mean(problem.weights)
    curvature = weight * energy / (problem.x.shape[1] * target_energy(problem))
    return jnp.where(curvature > 0, curvature, 1)
