"""One item of every menu so that all limits hold and the expected loss is least: a multiple-choice knapsack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from unified_approx.allocation.menu import Item, LayerMenu
from unified_approx.budget import UnreachableBudgetError

GAP = 1e-4  # relative to the optimum


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
        options={"mip_rel_gap": GAP, "time_limit": 60},
    )
    if found.x is None:
        raise UnreachableBudgetError(
            f"budget: no choice of sizes meets the limits on {', '.join(limits)} together; relax one of them"
        )
    chosen = np.flatnonzero(found.x > 0.5)
    return Choice(
        items=tuple(items[i] for i in chosen), loss=float(losses[chosen].sum()), gap=float(found.mip_gap or 0.0)
    )
