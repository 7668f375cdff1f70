"""What is asked of the two parts a and b of a layer: penalties or constraints, as pytrees that can be swept.

A penalty is two proximal steps, one for each part, and how the alternation's parameter t goes with it. ADMM knows
nothing else of it: a new penalty is a new class here (or in a user's code) with the same methods.
"""

from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from solvers.penalty_parameter import PenaltyRule, ResidualBalancing, SupportGrowth
from solvers.prox import (
    COLUMNS,
    Grouping,
    group_soft_threshold,
    project_groups,
    project_rank,
    singular_value_threshold,
)
from solvers.reconstruction import LayerProblem, is_concrete, scale_features, surrogate_gradient


class Proximal(NamedTuple):
    """The result of a proximal step.

    Attributes:
        point: the minimiser, (n, p).
        value: the penalty's term at `point`, 0 for a constraint.
        kept: which groups (of a) or singular directions (of b) of `point` are non-zero.
    """

    point: Float[Array, "n p"]
    value: Float[Array, ""]
    kept: Bool[Array, " groups"]


@runtime_checkable
class Penalty(Protocol):
    """g1(a) + g2(b), through its proximal steps. An instance is a pytree of traced values with static groupings."""

    def prox_sparse(self, v: Float[Array, "n p"], t: Float[Array, ""]) -> Proximal:
        """argmin_a g1(a) + t/2 ||a - v||^2."""
        ...

    def prox_low_rank(self, v: Float[Array, "n p"], t: Float[Array, ""]) -> Proximal:
        """argmin_b g2(b) + t/2 ||b - v||^2."""
        ...

    def validate(self, shape: tuple[int, int]) -> None:
        """Raises ValueError where a value is out of range for an (n, p) layer; traced values are not looked at."""
        ...

    @property
    def default_tau(self) -> float:
        """Where t starts, in units of the loss's mean curvature."""
        ...

    @property
    def default_rule(self) -> PenaltyRule:
        """How t moves."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Penalized:
    """lambda_sparse * sum_g ||a_g||_2 + lambda_rank * ||b||_*, with raw weights (the loss is 1/2 at m = 0).

    Both parts can be non-zero only in the band of `split_band`; equal fractions of `lambda_max` always lie inside it.

    Attributes:
        lambda_sparse: weight of the group norm, >= 0.
        lambda_rank: weight of the nuclear norm, >= 0.
        grouping: what the groups g are.
    """

    lambda_sparse: Float[ArrayLike, "..."]
    lambda_rank: Float[ArrayLike, "..."]
    grouping: Grouping = field(default=COLUMNS, metadata={"static": True})

    def prox_sparse(self, v: Float[Array, "n p"], t: Float[Array, ""]) -> Proximal:
        """argmin_a lambda_sparse * sum_g ||a_g||_2 + t/2 ||a - v||^2."""
        a = group_soft_threshold(v, self.lambda_sparse / t, self.grouping)
        norms = self.grouping.norms(a)
        return Proximal(a, jnp.sum(self.lambda_sparse * norms), norms > 0)

    def prox_low_rank(self, v: Float[Array, "n p"], t: Float[Array, ""]) -> Proximal:
        """argmin_b lambda_rank * ||b||_* + t/2 ||b - v||^2."""
        b, sigma = singular_value_threshold(v, self.lambda_rank / t)
        return Proximal(b, jnp.sum(self.lambda_rank * sigma), sigma > 0)

    def validate(self, shape: tuple[int, int]) -> None:
        """Raises ValueError for a weight that is negative or not finite, or a grouping that does not fit."""
        self.grouping.count(shape)
        for name in ("lambda_sparse", "lambda_rank"):
            value = getattr(self, name)
            if is_concrete(value) and not np.all(np.isfinite(value) & (np.asarray(value) >= 0)):
                raise ValueError(f"{name}={value}: pass a finite weight >= 0")

    @property
    def default_tau(self) -> float:
        """Where t starts, in units of the loss's mean curvature."""
        return 1.0

    @property
    def default_rule(self) -> PenaltyRule:
        """Residual balancing."""
        return ResidualBalancing()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Constrained:
    """At most `num_kept` non-zero groups in a, and rank(b) <= `rank`.

    Attributes:
        num_kept: groups of a, between 0 and their number.
        rank: of b, between 0 and min(n, p).
        grouping: what the groups are.
    """

    num_kept: Int[ArrayLike, "..."]
    rank: Int[ArrayLike, "..."]
    grouping: Grouping = field(default=COLUMNS, metadata={"static": True})

    def prox_sparse(self, v: Float[Array, "n p"], t: Float[Array, ""]) -> Proximal:
        """The nearest a with at most `num_kept` non-zero groups."""
        a = project_groups(v, self.num_kept, self.grouping)
        return Proximal(a, jnp.zeros((), v.dtype), self.grouping.norms(a) > 0)

    def prox_low_rank(self, v: Float[Array, "n p"], t: Float[Array, ""]) -> Proximal:
        """The nearest b of rank at most `rank`."""
        b, sigma = project_rank(v, self.rank)
        return Proximal(b, jnp.zeros((), v.dtype), sigma > 0)

    def validate(self, shape: tuple[int, int]) -> None:
        """Raises ValueError for a number out of range or not an integer, or a grouping that does not fit."""
        limits = {"num_kept": self.grouping.count(shape), "rank": min(shape)}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
                raise ValueError(f"{name}={value}: pass an integer between 0 and {limit}")
            if is_concrete(value) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) <= limit)):
                raise ValueError(f"{name}={value}: pass an integer between 0 and {limit} for a layer of shape {shape}")

    @property
    def default_tau(self) -> float:
        """Where t starts, in units of the loss's mean curvature: low, for the support has to move first."""
        return 0.03

    @property
    def default_rule(self) -> PenaltyRule:
        """Growth with the change of the support."""
        return SupportGrowth()


@partial(jax.jit, static_argnums=(1, 2))
def _lambda_max(
    problem: LayerProblem, grouping: Grouping, scale_columns: bool
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    scaled = scale_features(problem)[0] if scale_columns else problem
    n, p = problem.bias.shape[0], problem.x.shape[1]
    gradient = surrogate_gradient(scaled, jnp.zeros((n, p), problem.x.dtype))
    _, sigma = singular_value_threshold(gradient, 0.0)
    return jnp.max(grouping.norms(gradient)), jnp.max(sigma)


def lambda_max(
    problem: LayerProblem, grouping: Grouping = COLUMNS, *, scale_columns: bool = False
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The smallest weights (lambda_sparse, lambda_rank) for which a = b = 0 is stationary.

    With g = (T - z)' x / ||y||^2 the surrogate's gradient at m = 0: max_g ||g_g||_2 and ||g||_2 (largest singular
    value). The ReLU's own gradient will not do: with a zero bias it may vanish at m = 0 though m = 0 is far from
    optimal. Both are 0 where y is 0, and then a = b = 0 is optimal for any weights.

    Args:
        problem: the layer.
        grouping: what the groups are.
        scale_columns: as in the options of the solve that will use them.
    """
    return _lambda_max(problem, grouping, scale_columns)


def penalized_fractions(
    problem: LayerProblem,
    sparse: Float[ArrayLike, "..."],
    rank: Float[ArrayLike, "..."],
    grouping: Grouping = COLUMNS,
    *,
    scale_columns: bool = False,
) -> Penalized:
    """`Penalized` with weights given as fractions of `lambda_max`; arrays of fractions give a stack, as for a path.

    Raises:
        ValueError: a fraction is negative or not finite.
    """
    for name, value in (("sparse", sparse), ("rank", rank)):
        if is_concrete(value) and not np.all(np.isfinite(value) & (np.asarray(value) >= 0)):
            raise ValueError(f"{name}={value}: pass a finite fraction >= 0 of lambda_max")
    max_sparse, max_rank = lambda_max(problem, grouping, scale_columns=scale_columns)
    return Penalized(jnp.asarray(sparse) * max_sparse, jnp.asarray(rank) * max_rank, grouping)


def split_band(shape: tuple[int, int], grouping: Grouping = COLUMNS) -> tuple[float, float]:
    """The band (low, high) of lambda_rank / lambda_sparse outside which one part of the optimum is zero.

    Below `low` the nuclear norm is the cheaper way to pay for anything in a, so a = 0; above `high` the group norm is
    the cheaper way to pay for anything in b, so b = 0. With q the largest rank a single group can have, and N groups,

        ||a||_* <= sqrt(q) sum_g ||a_g||_2      and      sum_g ||b_g||_2 <= sqrt(N) ||b||_F <= sqrt(N) ||b||_*

    so low = 1 / sqrt(q) and high = sqrt(N): (1, sqrt(p)) for columns. Inside the band both parts may be non-zero.
    """
    return 1 / sqrt(grouping.max_rank(shape)), sqrt(grouping.count(shape))
