"""MUSCO: multi-stage compression by tensor decompositions whose ranks are chosen by the data (Gusak et al. 2019)."""

from unified_approx.multistage.compressor import Musco
from unified_approx.multistage.loop import musco
from unified_approx.multistage.options import MuscoOptions, Step

__all__ = ["Musco", "MuscoOptions", "Step", "musco"]
