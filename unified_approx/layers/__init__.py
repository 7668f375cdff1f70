"""Factored NNX layers: one file per kind of term; `FactoredConv` and `FactoredLinear` sum them."""

from unified_approx.layers.common import Index, TermLayer
from unified_approx.layers.factored import Factored, FactoredConv, FactoredLinear, factored_class, geometry_of
from unified_approx.layers.kinds import KINDS, layer_class

__all__ = [
    "KINDS",
    "Factored",
    "FactoredConv",
    "FactoredLinear",
    "Index",
    "TermLayer",
    "factored_class",
    "geometry_of",
    "layer_class",
]
