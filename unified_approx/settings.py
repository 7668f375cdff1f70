"""The arguments of a run, checked before any work is done."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from solvers.layer import LayerOptions, minimum_budget
from unified_approx.budget import Budget
from unified_approx.rules import Rule
from unified_approx.sites import LayerSite

Call = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one layer is asked for.

    Attributes:
        budget: fraction of its parameters, or None with penalties.
        penalties: (lambda_sparse, lambda_rank) as fractions of their maxima, or None with a budget.
        options: of the layer solver.
    """

    budget: Budget | None
    penalties: tuple[float, float] | None
    options: LayerOptions

    def values(self, site: LayerSite) -> float | None:
        """The budget in stored values."""
        shape = site.geometry.matrix_shape
        return None if self.budget is None else self.budget.params * shape.n * shape.p


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of `compress` that describe the run."""

    budget: Budget | None
    lambda_sparse: float | None
    lambda_rank: float | None
    rules: tuple[Rule, ...]
    options: LayerOptions
    rows: int | None
    held_out: float
    seed: int
    batch_size: int
    execution: str
    call: Call

    def __post_init__(self) -> None:
        _check_penalties(self.budget, self.lambda_sparse, self.lambda_rank)
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"held_out: {self.held_out!r} is not a fraction in (0, 1); 0.1 holds out every tenth image"
            )
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows: {self.rows} sampled positions; give at least 1, or None to choose")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size}; give at least 1")

    def settings(self, rule: Rule | None, site: LayerSite) -> Settings | None:
        """What the run and a rule together ask of a layer."""
        rule = rule or Rule(path="")
        if rule.keep:
            return None
        changes: dict[str, Any] = {k: v for k, v in (("form", rule.form), ("group", rule.group)) if v is not None}
        if np.any(site.outer_scale != 1):  # rows are rescaled after the solve, and identity rows would not survive that
            changes["gauge"] = False
        options = LayerOptions(**{**vars(self.options), **changes})
        own_penalties = (rule.lambda_sparse, rule.lambda_rank) != (None, None)
        if rule.budget is not None or (self.budget is not None and not own_penalties):
            return Settings(budget=rule.budget or self.budget, penalties=None, options=options)
        sparse = self.lambda_sparse if rule.lambda_sparse is None else rule.lambda_sparse
        rank = self.lambda_rank if rule.lambda_rank is None else rule.lambda_rank
        _check_penalties(None, sparse, rank)
        assert sparse is not None
        assert rank is not None
        return Settings(budget=None, penalties=(sparse, rank), options=options)

    def identity(self) -> dict[str, Any]:
        """Everything that decides what the solved layers are."""
        return {k: repr(v) for k, v in vars(self).items() if k not in ("call", "execution")}

    def describe(self) -> str:
        """The run's target as text."""
        if self.budget is not None:
            return self.budget.describe()
        return f"lambda_sparse={self.lambda_sparse:g}, lambda_rank={self.lambda_rank:g}"


def _check_penalties(budget: Budget | None, sparse: float | None, rank: float | None) -> None:
    if budget is not None:
        if sparse is not None or rank is not None:
            raise ValueError("budget, lambda_sparse, lambda_rank: give a budget or the two penalties, not both")
        if not isinstance(budget, Budget):
            raise ValueError(f"budget: {budget!r} is a {type(budget).__name__}; give Budget(params=0.5)")
        return
    if sparse is None or rank is None:
        raise ValueError("budget: none given; give budget=Budget(params=0.5), or both lambda_sparse and lambda_rank")
    for name, value in (("lambda_sparse", sparse), ("lambda_rank", rank)):
        if not 0 <= value <= 1:
            raise ValueError(
                f"{name}: {value!r} is not in [0, 1]; penalties are fractions of their largest useful value"
            )


def check_weights(model: nnx.Module) -> None:
    """Raise a ValueError if a weight is NaN or infinite."""
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))):
        value = np.asarray(leaf[...])
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise ValueError(f"model: {'/'.join(map(str, path))} holds NaN or infinite values; load sound weights")


def check_reachable(site: LayerSite, settings: Settings | None) -> None:
    """Raise a ValueError if the budget is below the smallest the layer can reach, naming that."""
    shape = site.geometry.matrix_shape
    least = minimum_budget(shape) / (shape.n * shape.p)
    if settings is not None and settings.budget is not None and settings.budget.params < least:
        raise ValueError(
            f"budget: {settings.budget.describe()} is below what layer {site.name!r} can reach; its minimum is "
            f"params={least:.4f}: raise the budget, or keep the layer with Rule(path={site.name!r}, keep=True)"
        )


def make_arguments(options: LayerOptions | None, form: str | None, group: str | None, **rest: Any) -> Arguments:
    """The checked arguments of a run; `form` and `group` override those of `options`."""
    base = vars(options or LayerOptions())
    changes = {k: v for k, v in (("form", form), ("group", group)) if v is not None}
    rest["rules"] = tuple(rest["rules"])
    rest["call"] = rest["call"] or (lambda model, batch: model(batch))
    return Arguments(options=LayerOptions(**{**base, **changes}), **rest)
