"""The Learning-Compression algorithm."""

from unified_approx.learning_compression.algorithm import LcStoppedError, lc
from unified_approx.learning_compression.finetuning import finetune_compressed
from unified_approx.learning_compression.informed import informed
from unified_approx.learning_compression.l_step import LStep, Schedule, SgdLStep
from unified_approx.learning_compression.layerwise import LayerLStep, compress_layer
from unified_approx.learning_compression.penalty import Penalty
from unified_approx.learning_compression.result import LcResult, Step
from unified_approx.learning_compression.schedules import MuSchedule, exponential
from unified_approx.learning_compression.task_language import parse_tasks
from unified_approx.learning_compression.tasks import Task

__all__ = [
    "LStep",
    "LayerLStep",
    "LcResult",
    "LcStoppedError",
    "MuSchedule",
    "Penalty",
    "Schedule",
    "SgdLStep",
    "Step",
    "Task",
    "compress_layer",
    "exponential",
    "finetune_compressed",
    "informed",
    "lc",
    "parse_tasks",
]
