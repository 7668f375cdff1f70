"""Shares the budget of a network among its layers."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from flax import nnx

from unified_approx.allocation.assign import assign_by_loss, assign_uniform, open_limits, total_cost
from unified_approx.allocation.build import measure_sensitivity
from unified_approx.allocation.knapsack import Choice
from unified_approx.allocation.sensitivity import Sensitivity
from unified_approx.allocation.timing import sized_terms
from unified_approx.assemble import assemble
from unified_approx.budget import Budget, UnreachableBudgetError
from unified_approx.cost import network_cost
from unified_approx.settings import Settings, check_reachable
from unified_approx.sites import Path
from unified_approx.unread import remove_unread

if TYPE_CHECKING:
    from unified_approx.run import Run

Propose = Callable[..., tuple[dict[Path, Settings], Choice]]
"""From factors on the limits to what each layer is asked for."""

_REHEARSALS, _LOOSER = 8, 20
_AIM, _FULL = 0.985, 0.96  # of the budget: where the search aims, and where it is content


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
    open_limits(run, budget)
    if method == "uniform":
        table, propose = None, partial(assign_uniform, run, budget)
    else:
        if table is None:
            table = measure_sensitivity(run, method, step)
        elif table.identity != run.sensitivity_identity(table.method):
            raise ValueError(
                "sensitivity: the table is of another network, other data or groups, or timed where this run is not "
                "(or the other way round); leave it out"
            )
        propose = partial(assign_by_loss, run, budget, table)
    predictable = any(s.sized for s in run.settings.values() if s.open)
    found, choice = _rehearsed(run, budget, propose) if predictable else propose()
    run.settings |= found
    run.gap = None if table is None else choice.gap
    for site in run.capture.sites:
        check_reachable(site, run.settings[site.path])
    return table


def _rehearsed(run: "Run", budget: Budget, propose: Propose) -> tuple[dict[Path, Settings], Choice]:
    """Settings under which the network as a whole keeps the budget, which its layers one by one do not tell.

    Channels that are not read go from other layers too, and layers take other times alone than in the network. So a
    network of the chosen sizes is built and costed, and the limits are moved until it just fits.
    """
    limits = budget.given()
    scale, least = dict.fromkeys(limits, 1.0), dict.fromkeys(limits, inf)
    found, choice = _first(propose, scale)
    best: tuple[dict[Path, Settings], Choice] | None = None
    for _ in range(_REHEARSALS):
        used = {name: cost / limits[name] for name, cost in _costs(run, _rehearsal(run, found, choice), limits).items()}
        fits, before = max(used.values()) <= 1, choice
        least = {name: min(least[name], cost * limits[name]) for name, cost in used.items()}
        if fits and (best is None or choice.loss < best[1].loss):
            best = found, choice
        if fits and min(used.values()) >= _FULL:
            break
        # Savings in two layers at once make the cost nearly quadratic in the limit: half a step never overshoots far.
        scale = {name: s * (_AIM / used[name]) ** 0.6 for name, s in scale.items()}
        try:
            found, choice = propose(scale)
        except ValueError:  # moved below what the layers can reach: the budget itself is not at fault
            break
        if fits and max(used.values()) >= _FULL and choice.items == before.items:
            break  # what is not used up does not bind
    if best is None and min(scale.values()) > 1:  # even what the layers can do at most was too much
        reached = ", ".join(f"{name}={value:.4f}" for name, value in least.items())
        raise UnreachableBudgetError(
            f"budget: {budget.describe()} is below the smallest that can be reached, {reached}; raise it, or let more "
            "layers be compressed"
        )
    return (found, choice) if best is None else best


def _first(propose: Propose, scale: dict[str, float]) -> tuple[dict[Path, Settings], Choice]:
    """The first proposal. Limits that the layers one by one cannot meet are raised in `scale` until they can.

    Channels that nothing reads may then make up for it.
    """
    for _ in range(_LOOSER):
        try:
            return propose(scale)
        except UnreachableBudgetError:
            for name in scale:
                scale[name] *= 1.25
    return propose(scale)


def _costs(run: "Run", network: nnx.Module, names: Collection[str]) -> dict[str, float]:
    """What is left of each cost, as a fraction of the original's."""
    network, _ = remove_unread(network, run.example, run.arguments.call)
    after = network_cost(network, run.example, call=run.arguments.call)
    found = {k: total_cost(after, k) / total_cost(run.cost, k) for k in names if k != "latency"}
    if run.timer is not None:
        found["latency"] = run.timer.against_dense(network)[1]
    return found


def _rehearsal(run: "Run", found: Mapping[Path, Settings], choice: Choice) -> nnx.Module:
    """A network of the chosen sizes with arbitrary values.

    A layer whose form is chosen later is taken to read all its channels, at the multiply-adds of its size.
    """
    made = {}
    sites = [site for site in run.capture.sites if site.path in found]
    for seed, (site, item) in enumerate(zip(sites, choice.items, strict=True)):
        shape, form, size = site.geometry.matrix_shape, item.form, item.size
        if form == "dense":
            continue
        if not run.settings[site.path].sized:
            form, size = "low_rank", max(1, round(item.macs / run.positions(site) / (shape.n + shape.p)))
        made[site.path] = run.module(site, sized_terms(form, size, shape, seed), site.shift)
    return assemble(run.model, made, run.capture.sites)
