"""Shares the budget of a network among its layers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flax import nnx

from unified_approx.allocation.assign import assign_by_loss, assign_uniform, open_limits
from unified_approx.allocation.build import measure_sensitivity
from unified_approx.allocation.knapsack import Choice
from unified_approx.allocation.sensitivity import Sensitivity
from unified_approx.allocation.timing import LayerTimer, sized_terms
from unified_approx.assemble import assemble
from unified_approx.budget import Budget
from unified_approx.settings import Settings, check_reachable
from unified_approx.sites import Path

if TYPE_CHECKING:
    from unified_approx.run import Run

_REHEARSALS = 3
_MARGIN = 0.97  # timings of the same network differ by a few percent


def allocate(run: "Run", table: Sensitivity | None, step: Callable[[int, int, str], Any]) -> Sensitivity | None:
    """Settle the layers whose size is open; the table that decided, if any did.

    Args:
        run: its settings are replaced.
        table: measured before, or None to measure now.
        step: called with (index, total, name) before each layer that is measured.

    Raises:
        ValueError: a budget that cannot be reached, or a table of another network or of other data.
    """
    budget, method = run.arguments.budget, run.arguments.allocation
    if budget is None or not any(s.open for s in run.settings.values()):
        return None
    if method == "uniform":
        run.settings |= assign_uniform(run, budget)
    else:
        open_limits(run, budget)
        if table is None:
            table = measure_sensitivity(run, method, step)
        elif table.identity != run.sensitivity_identity(table.method):
            raise ValueError(
                "sensitivity: the table is of another network, other data or groups, or timed where this run is not "
                "(or the other way round); leave it out"
            )
        found, choice = assign_by_loss(run, budget, table)
        if run.timer is not None and budget.latency is not None:
            found = _rehearsed(run, run.timer, budget, budget.latency, table, found, choice)
        run.settings |= found
    for site in run.capture.sites:
        check_reachable(site, run.settings[site.path])
    return table


def _rehearsed(
    run: "Run",
    timer: LayerTimer,
    budget: Budget,
    latency: float,
    table: Sensitivity,
    found: dict[Path, Settings],
    choice: Choice,
) -> dict[Path, Settings]:
    """Settings whose network is fast enough as a whole: layers take other times alone than in the network."""
    tried = latency
    for _ in range(_REHEARSALS):
        ratio = timer.ratio_to_dense(_rehearsal(run, found, choice))
        if ratio <= _MARGIN * latency:
            break
        tried *= _MARGIN * latency / ratio
        found, choice = assign_by_loss(run, replace(budget, latency=tried), table)
    return found


def _rehearsal(run: "Run", found: Mapping[Path, Settings], choice: Choice) -> nnx.Module:
    """A network as fast as the one that would be solved for, with arbitrary values."""
    sites = [site for site in run.capture.sites if site.path in found]
    made = {
        site.path: run.module(site, sized_terms(item.form, item.size, site.geometry.matrix_shape), site.shift)
        for site, item in zip(sites, choice.items, strict=True)
        if item.form != "dense"
    }
    return assemble(run.model, made, run.capture.sites)
