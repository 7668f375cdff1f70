"""The Learning-Compression algorithm."""

from unified_approx.learning_compression.algorithm import LcStoppedError, lc
from unified_approx.learning_compression.l_step import LStep, Schedule, SgdLStep
from unified_approx.learning_compression.penalty import Penalty
from unified_approx.learning_compression.result import LcResult, Step
from unified_approx.learning_compression.schedules import MuSchedule, exponential
from unified_approx.learning_compression.tasks import Task

__all__ = [
    "LStep",
    "LcResult",
    "LcStoppedError",
    "MuSchedule",
    "Penalty",
    "Schedule",
    "SgdLStep",
    "Step",
    "Task",
    "exponential",
    "lc",
]
