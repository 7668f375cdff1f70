"""The Learning-Compression algorithm."""

from unified_approx.learning_compression.algorithm import LcResult, Step, lc
from unified_approx.learning_compression.fast import TaylorLStep, direct_compression, fast_lc
from unified_approx.learning_compression.l_step import LStep, Schedule, SgdLStep, cross_entropy
from unified_approx.learning_compression.penalty import Penalty
from unified_approx.learning_compression.tasks import Task
from unified_approx.learning_compression.taylor import NetworkTaylor, load_taylor, taylor_of

__all__ = [
    "LStep",
    "LcResult",
    "NetworkTaylor",
    "Penalty",
    "Schedule",
    "SgdLStep",
    "Step",
    "Task",
    "TaylorLStep",
    "cross_entropy",
    "direct_compression",
    "fast_lc",
    "lc",
    "load_taylor",
    "taylor_of",
]
