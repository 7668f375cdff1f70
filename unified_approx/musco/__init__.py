"""MUSCO: multi-stage compression by tensor decompositions whose ranks are chosen by the data (Gusak et al. 2019)."""

from unified_approx.musco.compressor import Musco, MuscoOptions, Step
from unified_approx.musco.loop import musco

__all__ = ["Musco", "MuscoOptions", "Step", "musco"]
