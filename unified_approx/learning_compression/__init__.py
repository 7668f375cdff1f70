"""The Learning-Compression algorithm."""

from unified_approx.learning_compression.algorithm import LcResult, Step, lc
from unified_approx.learning_compression.l_step import LStep, Schedule, SgdLStep, cross_entropy
from unified_approx.learning_compression.penalty import Penalty
from unified_approx.learning_compression.tasks import Task

__all__ = ["LStep", "LcResult", "Penalty", "Schedule", "SgdLStep", "Step", "Task", "cross_entropy", "lc"]
