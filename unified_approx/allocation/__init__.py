"""One budget over all layers: menus of sizes, what each costs the network's output, and the best choice of them."""

from unified_approx.allocation.knapsack import Choice, choose
from unified_approx.allocation.menu import Item, LayerMenu
from unified_approx.allocation.sensitivity import Sensitivity

__all__ = ["Choice", "Item", "LayerMenu", "Sensitivity", "choose"]
