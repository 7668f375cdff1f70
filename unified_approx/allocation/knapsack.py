"""One item of every menu so that all limits hold and the expected loss is least: a multiple-choice knapsack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from unified_approx.allocation.menu import Item, LayerMenu
from unified_approx.budget import UnreachableBudgetError

GAP = 1e-4  # relative to the optimum
_SECONDS, _OUT_OF_TIME = 60, 1


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen items.

    Attributes:
        items: one per menu, in the same order.
        loss: the sum of their losses.
        gap: proven bound on how much better another choice could be, relative.
    """

    items: tuple[Item, ...]
    loss: float
    gap: float


def choose(menus: Sequence[LayerMenu], limits: Mapping[str, float]) -> Choice:
    """Minimise the sum of the items' losses, one item per menu, with the sum of each named cost within its limit.

    Args:
        menus: of the layers.
        limits: by cost name ("params", "macs", "bytes"): the most that all layers together may cost.

    Raises:
        UnreachableBudgetError: no choice is within all limits.
        ValueError: none was found in time.
    """
    items = [item for menu in menus for item in menu.items]
    owner = np.repeat(np.arange(len(menus)), [len(menu.items) for menu in menus])
    one_each = lil_array((len(menus), len(items)))
    one_each[owner, np.arange(len(items))] = 1
    losses = np.array([item.loss for item in items])
    scale = max(float(np.median(losses[losses > 0])) if (losses > 0).any() else 1.0, np.finfo(float).tiny)
    costs = np.array([[item.cost(name) for item in items] for name in limits])
    bounds = np.array(list(limits.values()))
    found = milp(
        losses / scale,
        integrality=np.ones(len(items)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each.tocsr(), 1, 1),
            LinearConstraint(costs / bounds[:, None], -np.inf, 1),
        ],
        options={"mip_rel_gap": GAP, "time_limit": _SECONDS},
    )
    if found.x is None and found.status == _OUT_OF_TIME:
        raise ValueError(
            f"budget: no choice of sizes that meets the limits on {', '.join(limits)} together was found within "
            f"{_SECONDS} s; relax one of them"
        )
    if found.x is None:
        raise UnreachableBudgetError(
            f"budget: no choice of sizes meets the limits on {', '.join(limits)} together; relax one of them. With the "
            f"others as they are: {_reachable(menus, limits)}"
        )
    chosen = np.flatnonzero(found.x > 0.5)
    return Choice(
        items=tuple(items[i] for i in chosen), loss=float(losses[chosen].sum()), gap=float(found.mip_gap or 0.0)
    )


def _reachable(menus: Sequence[LayerMenu], limits: Mapping[str, float]) -> str:
    """For each limit by how much it must grow while all others stay."""
    words = []
    for name, limit in limits.items():
        others = {other: value for other, value in limits.items() if other != name}
        least = _least(menus, name, others)
        if least is not None and least > limit:
            words.append(f"{name} times {least / limit:.3f}")
    return ", or ".join(words) or "none of them alone is enough"


def _least(menus: Sequence[LayerMenu], name: str, limits: Mapping[str, float]) -> float | None:
    """The least of one cost within limits on others; None if these cannot be met either."""
    cheap = [replace(menu, items=tuple(replace(item, loss=item.cost(name)) for item in menu.items)) for menu in menus]
    try:
        return choose(cheap, limits or {name: float("inf")}).loss
    except UnreachableBudgetError:
        return None
