"""The Learning-Compression algorithm."""

from unified_approx.learning_compression.algorithm import LcStoppedError, lc
from unified_approx.learning_compression.fast import TaylorLStep, direct_compression, fast_lc
from unified_approx.learning_compression.finetuning import finetune_compressed
from unified_approx.learning_compression.informed import informed
from unified_approx.learning_compression.l_step import LStep, Schedule, SgdLStep
from unified_approx.learning_compression.layerwise import LayerLStep, compress_layer
from unified_approx.learning_compression.operations import Operations, operations
from unified_approx.learning_compression.penalty import Penalty
from unified_approx.learning_compression.result import LcResult, Step
from unified_approx.learning_compression.schedules import MuSchedule, exponential
from unified_approx.learning_compression.task_language import parse_tasks
from unified_approx.learning_compression.tasks import Task
from unified_approx.learning_compression.taylor import NetworkTaylor, load_taylor, taylor_of

__all__ = [
    "LStep",
    "LayerLStep",
    "LcResult",
    "LcStoppedError",
    "MuSchedule",
    "NetworkTaylor",
    "Operations",
    "Penalty",
    "Schedule",
    "SgdLStep",
    "Step",
    "Task",
    "TaylorLStep",
    "compress_layer",
    "direct_compression",
    "exponential",
    "fast_lc",
    "finetune_compressed",
    "informed",
    "lc",
    "load_taylor",
    "operations",
    "parse_tasks",
    "taylor_of",
]
