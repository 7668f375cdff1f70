"""The arguments of a run, checked before any work is done."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from solvers.factor_sizes import check_ranks, cost
from solvers.layer import LayerOptions, minimum_budget
from solvers.sharding import Devices, row_mesh
from unified_approx.budget import Budget, UnreachableBudgetError
from unified_approx.calling import Call, forward
from unified_approx.rules import Rule
from unified_approx.sites import LayerSite

MEASURED = ("kl", "fisher")  # ways to measure what the network's output feels
ALLOCATIONS = (*MEASURED, "uniform")
SIZED = ("columns", "low_rank")  # forms whose size alone tells what they cost and how long they take
BY_RULE = "by rule"
_BEFORE_THE_STRIDE = ("spatial", "tucker2", "cp3", "cp4")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one layer is asked for: a fraction of its stored values, or penalties, or, until allocated, neither.

    Attributes:
        fraction: of its stored values; where ranks are given, what these come to.
        penalties: (lambda_sparse, lambda_rank) as fractions of their maxima.
        options: of the layer solver.
        dense: why the layer stays as it is; empty if it does not.
        expected_loss: nats that the network's output is expected to lose by it, where that was measured.
    """

    options: LayerOptions
    fraction: float | None = None
    penalties: tuple[float, float] | None = None
    dense: str = ""
    expected_loss: float | None = None

    @property
    def sized(self) -> tuple[str, ...]:
        """Forms among which form and size decide what the layer will cost; none if that is only known once solved."""
        return _sized(self.options) if self.options.group == "channel" else ()

    def menu_forms(self, timed: bool) -> tuple[str, ...]:
        """Forms that the layer's menu keeps side by side; none if the better of them stands for a size."""
        if timed:
            return SIZED
        return self.sized if self.sized and "columns" not in self.sized else ()

    @property
    def open(self) -> bool:
        """Whether the budget of the whole network decides."""
        return self.fraction is None and self.penalties is None and not self.dense

    def values(self, site: LayerSite) -> float | None:
        """The budget in stored values."""
        shape = site.geometry.matrix_shape
        return None if self.fraction is None else self.fraction * shape.n * shape.p


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of `compress` that describe the run."""

    rules: tuple[Rule, ...]
    options: LayerOptions
    call: Call
    budget: Budget | None = None
    lambda_sparse: float | None = None
    lambda_rank: float | None = None
    rows: int | None = None
    held_out: float = 0.1
    seed: int = 0
    batch_size: int = 200
    execution: str = "auto"
    allocation: str = "kl"
    devices: Devices | None = None

    def __post_init__(self) -> None:
        _check_target(self.budget, self.lambda_sparse, self.lambda_rank, self.rules)
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation: {self.allocation!r} is unknown; choose one of {', '.join(ALLOCATIONS)}")
        if self.allocation == "uniform" and self.budget is not None and self.timed:
            raise ValueError(
                f"allocation: 'uniform' knows no seconds, which {self.budget.describe()} limits; use kl or fisher"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"held_out: {self.held_out!r} is not a fraction in (0, 1); 0.1 holds out every tenth image"
            )
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows: {self.rows} sampled positions; give at least 1, or None to choose")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size}; give at least 1")
        _ = self.mesh  # raises for too many devices

    @property
    def timed(self) -> bool:
        """Whether the budget limits seconds."""
        return self.budget is not None and self.budget.latency is not None

    @property
    def mesh(self) -> Mesh | None:
        """The devices that a layer's rows are split over; None for one, the default."""
        return None if self.devices is None or self.devices == 1 else row_mesh(self.devices)

    def settings(self, rule: Rule | None, site: LayerSite) -> Settings:
        """What the run and a rule together ask of a layer."""
        rule = rule or Rule(path="")
        asked = {"form": rule.form, "group": rule.group, "ranks": rule.ranks}
        changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        if np.any(site.outer_scale != 1):  # rows are rescaled after the solve, and identity rows would not survive that
            changes["gauge"] = False
        options = LayerOptions(**{**vars(self.options), **changes})
        if self.budget is not None and self.budget.macs is not None and options.ranks is None:
            options = _counted_in_macs(options, site)
        if self.timed and options.ranks is None:
            options = _counted_in_seconds(options, site)
        if rule.keep:
            return Settings(options=options, dense=BY_RULE)
        if options.ranks is not None:
            return _with_ranks(options, site)
        if rule.budget is not None:
            return Settings(options=options, fraction=rule.budget.params)
        own = (rule.lambda_sparse, rule.lambda_rank) != (None, None)
        if self.lambda_sparse is None and not own:
            if self.budget is None:
                raise ValueError(f"budget: none given for layer {site.name!r}, which no rule gives one; {_REMEDY}")
            return Settings(options=options)
        sparse = self.lambda_sparse if rule.lambda_sparse is None else rule.lambda_sparse
        rank = self.lambda_rank if rule.lambda_rank is None else rule.lambda_rank
        _check_penalties(sparse, rank)
        return Settings(options=options, penalties=(sparse, rank))  # pyright: ignore[reportArgumentType]

    def identity(self) -> dict[str, Any]:
        """Everything that decides what the solved layers are."""
        return {k: repr(v) for k, v in vars(self).items() if k not in ("call", "execution", "devices")}

    def describe(self) -> str:
        """The run's target as text."""
        if self.budget is not None:
            return self.budget.describe()
        if self.lambda_sparse is None or self.lambda_rank is None:
            return "by rules"
        return f"lambda_sparse={self.lambda_sparse:g}, lambda_rank={self.lambda_rank:g}"


def _with_ranks(options: LayerOptions, site: LayerSite) -> Settings:
    """Settings of a layer whose form and ranks are given."""
    shape = site.geometry.matrix_shape
    assert isinstance(options.form, str)
    assert options.ranks is not None
    try:
        check_ranks(options.form, shape, options.ranks)
    except ValueError as error:
        raise ValueError(f"rules: layer {site.name!r}: {error}") from error
    return Settings(options=options, fraction=cost(options.form, shape, options.ranks) / (shape.n * shape.p))


def _counted_in_macs(options: LayerOptions, site: LayerSite) -> LayerOptions:
    """Options under which a form's stored values are its multiply-adds per position.

    Identity blocks save storage but are multiplied by; the first factor of a spatial or tensor form runs before the
    stride.
    """
    forms = options.wanted()
    if any(stride != 1 for stride in site.geometry.strides):
        forms = tuple(form for form in forms if form not in _BEFORE_THE_STRIDE) or forms
    return replace(options, gauge=False, form=forms)


def _sized(options: LayerOptions) -> tuple[str, ...]:
    return tuple(form for form in SIZED if form in options.wanted())


def _counted_in_seconds(options: LayerOptions, site: LayerSite) -> LayerOptions:
    """Options under which the sizes that were timed are those that a solve finds: whole channels and ranks."""
    forms = _sized(options)
    if not forms:
        raise ValueError(
            f"form: {options.form!r} of layer {site.name!r} cannot be timed before it is solved, which "
            f"Budget(latency=...) needs; choose best, {' or '.join(SIZED)}"
        )
    return replace(options, gauge=False, group="channel", form=forms)


_REMEDY = "give budget=Budget(params=0.5), or both lambda_sparse and lambda_rank"


def _check_target(budget: Budget | None, sparse: float | None, rank: float | None, rules: tuple[Rule, ...]) -> None:
    sized = any(rule.budget is not None or rule.ranks is not None for rule in rules)
    if budget is None and (sparse, rank) == (None, None) and sized:
        return
    if budget is None:
        _check_penalties(sparse, rank)
        return
    if (sparse, rank) != (None, None):
        raise ValueError("budget, lambda_sparse, lambda_rank: give a budget or the two penalties, not both")
    if not isinstance(budget, Budget):
        raise ValueError(f"budget: {budget!r} is a {type(budget).__name__}; give Budget(params=0.5)")


def _check_penalties(sparse: float | None, rank: float | None) -> None:
    if sparse is None or rank is None:
        raise ValueError(f"budget: none given; {_REMEDY}")
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


def check_reachable(site: LayerSite, settings: Settings) -> None:
    """Raise an UnreachableBudgetError if the layer's fraction is below the smallest it can reach, naming that."""
    shape = site.geometry.matrix_shape
    least = minimum_budget(shape) / (shape.n * shape.p)
    if settings.options.ranks is None and settings.fraction is not None and settings.fraction < least:
        raise UnreachableBudgetError(
            f"budget: params={settings.fraction:g} is below what layer {site.name!r} can reach; its minimum is "
            f"params={least:.4f}: raise the budget, or keep the layer with Rule(path={site.name!r}, keep=True)"
        )


def make_arguments(
    *,
    options: LayerOptions | None = None,
    form: str | None = None,
    group: str | None = None,
    round_to: int | None = None,
    **rest: Any,
) -> Arguments:
    """The checked arguments of a run; `form`, `group` and `round_to` override those of `options`."""
    base = vars(options or LayerOptions())
    given = {"form": form, "group": group, "round_to": round_to}
    changes = {name: value for name, value in given.items() if value is not None}
    rest["rules"] = tuple(rest.get("rules", ()))
    rest["call"] = rest.get("call") or forward
    return Arguments(options=LayerOptions(**{**base, **changes}), **rest)
