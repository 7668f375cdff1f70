"""From the budget of the network to what each layer is asked for."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from solvers.forms import largest_count, largest_rank
from solvers.layer import minimum_budget
from unified_approx.allocation.knapsack import Choice, choose
from unified_approx.allocation.menu import Item, LayerMenu
from unified_approx.allocation.sensitivity import Sensitivity
from unified_approx.allocation.timing import Clock
from unified_approx.budget import Budget, UnreachableBudgetError
from unified_approx.cost import NetworkCost
from unified_approx.settings import Settings
from unified_approx.sites import LayerSite, Path

if TYPE_CHECKING:
    from unified_approx.run import Run

DENSE = "dense pays best under the budget"
NO_CHANNEL = "not one whole channel is within its share of the budget"


def total_cost(cost: NetworkCost, name: str) -> float:
    """What a budget of that name counts of a network: values, indices at 32 bits to a value, or multiply-adds."""
    return float(cost.macs) if name == "macs" else cost.params + cost.index_bits / 32


def open_limits(
    run: "Run", budget: Budget, clock: Clock | None = None, scale: Mapping[str, float] | None = None
) -> dict[str, float]:
    """What the layers of open size may cost together, by cost name, after all others have had their share.

    Seconds are limited only where the clock of a sensitivity table is given. The fractions of the budget are multiplied
    by `scale`.

    Raises:
        ValueError: the other layers alone exceed the budget.
    """
    limits = {}
    for name, fraction in budget.given().items():
        if name == "latency":
            if clock is None:
                continue
            total = clock.original
            fixed = max(0.0, total - sum(clock.layers[site.name] for site in _open_sites(run)))
        else:
            total = total_cost(run.cost, name)
            fixed = total - sum(_cost(run, site, name) * _saved(run.settings[site.path]) for site in run.capture.sites)
        limits[name] = fraction * (scale or {}).get(name, 1.0) * total - fixed
        if limits[name] <= 0:
            raise UnreachableBudgetError(
                f"budget: {name}={fraction:g}, but the layers that are kept or have budgets of their own already take "
                f"{fixed / total:.4f} of the network; raise the budget above that or let more layers be compressed"
            )
    return limits


def _cost(run: "Run", site: LayerSite, name: str) -> float:
    shape = site.geometry.matrix_shape
    return float(shape.n * shape.p * (run.positions(site) if name == "macs" else 1))


def _saved(settings: Settings) -> float:
    """The share of a layer that is not settled: all of it if open, what its rule takes away if not."""
    if settings.open:
        return 1.0
    return 0.0 if settings.fraction is None else 1 - settings.fraction


def assign_uniform(
    run: "Run", budget: Budget, scale: Mapping[str, float] | None = None
) -> tuple[dict[Path, Settings], Choice]:
    """The same fraction for every open layer, or its least where that is more; the largest within all limits.

    Its "loss" is what it leaves away.
    """
    sites, limits = _open_sites(run), open_limits(run, budget, scale=scale)
    least = np.array([minimum_budget(s.geometry.matrix_shape) / _cost(run, s, "params") for s in sites])
    costs = {name: np.array([_cost(run, s, name) for s in sites]) for name in limits}
    _check_reachable(run, budget, limits, {name: float(cost @ least) for name, cost in costs.items()})

    def too_much(fraction: float) -> bool:
        shares = np.maximum(fraction, least)
        return any(costs[name] @ shares > limit for name, limit in limits.items())

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if too_much(middle) else (middle, high)
    fractions = np.minimum(np.maximum(low if too_much(1.0) else 1.0, least), 1.0)
    items = tuple(_item_of(run, site, float(f)) for site, f in zip(sites, fractions, strict=True))
    found = {}
    for site, item, fraction in zip(sites, items, fractions, strict=True):
        settings = run.settings[site.path]
        if item.form == "dense":
            found[site.path] = replace(settings, dense=NO_CHANNEL)
        else:
            found[site.path] = replace(_in_form(settings, item.form), fraction=float(fraction))
    return found, Choice(items=items, loss=1 - float(np.mean(fractions)), gap=0.0)


def _in_form(settings: Settings, form: str) -> Settings:
    """In the form that was settled with the size, where it was."""
    return replace(settings, options=replace(settings.options, form=form)) if settings.sized else settings


def _item_of(run: "Run", site: LayerSite, fraction: float) -> Item:
    """What a fraction of a layer stands for: whole channels where these are chosen, else that much of each cost."""
    shape, settings = site.geometry.matrix_shape, run.settings[site.path]
    values = fraction * shape.n * shape.p
    if "columns" in settings.sized:
        members = shape.p // shape.c_in
        form, size = "columns", largest_count(values, shape.n, shape.p, members) * members
        if not size:
            form, size, values = "dense", shape.p, float(shape.n * shape.p)
    else:
        form, size = "low_rank", max(1, largest_rank(values, shape.n, shape.p, gauge=False))
    return Item(form=form, size=size, values=values, macs=values * run.positions(site), error=0.0)


def assign_by_loss(
    run: "Run", budget: Budget, table: Sensitivity, scale: Mapping[str, float] | None = None
) -> tuple[dict[Path, Settings], Choice]:
    """The sizes of least expected loss within all limits; where forms differ in more than their error, those too."""
    sites, limits = _open_sites(run), open_limits(run, budget, table.clock, scale)
    menus = [_menu(table, site, run.settings[site.path].sized) for site in sites]
    least = {name: sum(min(item.cost(name) for item in menu.items) for menu in menus) for name in limits}
    _check_reachable(run, budget, limits, least, table)
    choice = choose(menus, limits)
    found = {}
    for site, item in zip(sites, choice.items, strict=True):
        shape, settings = site.geometry.matrix_shape, run.settings[site.path]
        if item.form == "dense":
            found[site.path] = replace(settings, dense=DENSE)
        else:
            fraction = max(item.values, minimum_budget(shape)) / (shape.n * shape.p)
            found[site.path] = replace(_in_form(settings, item.form), fraction=fraction, expected_loss=item.loss)
    return found, choice


def _menu(table: Sensitivity, site: LayerSite, forms: tuple[str, ...]) -> LayerMenu:
    """The layer's sizes; where the form is settled with the size, in the given forms only."""
    menu = next((m for m in table.menus if m.name == site.name), None)
    if menu is None:
        raise ValueError(
            f"sensitivity: the table has no sizes of layer {site.name!r}, which was kept or had a budget of its own "
            "when it was measured; measure again with these rules"
        )
    return replace(menu, items=tuple(i for i in menu.items if not forms or i.form in (*forms, "dense")))


def _open_sites(run: "Run") -> list[LayerSite]:
    return [site for site in run.capture.sites if run.settings[site.path].open]


def _check_reachable(
    run: "Run",
    budget: Budget,
    limits: Mapping[str, float],
    least: Mapping[str, float],
    table: Sensitivity | None = None,
) -> None:
    """Raise an error that names the smallest reachable fraction if the least cost is above a limit."""
    for name, limit in limits.items():
        clock = None if table is None else table.clock
        total = clock.original if clock is not None and name == "latency" else total_cost(run.cost, name)
        if limit < least[name]:
            reachable = budget.given()[name] + (least[name] - limit) / total
            raise UnreachableBudgetError(
                f"budget: {name}={budget.given()[name]:g} is below the smallest that can be reached, "
                f"{name}={reachable:.4f}; raise it, or let more layers be compressed"
            )
