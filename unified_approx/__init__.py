"""Make trained Flax networks smaller and faster: column-sparse plus low-rank layers, fitted after the ReLU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified_approx import datasets, evaluate, zoo
    from unified_approx.allocation import Sensitivity
    from unified_approx.budget import Budget
    from unified_approx.finetuning import finetune, match_outputs
    from unified_approx.latency import choose_executions, fastest, fastest_dense
    from unified_approx.learning_compression import (
        LcResult,
        Schedule,
        SgdLStep,
        Task,
        direct_compression,
        exponential,
        fast_lc,
        finetune_compressed,
        informed,
        lc,
        load_taylor,
        parse_tasks,
        taylor_of,
    )
    from unified_approx.multistage import Musco, MuscoOptions, musco
    from unified_approx.pipeline import Result, compress, plan, sensitivity
    from unified_approx.planning import Plan
    from unified_approx.recalibration import recalibrate_norms
    from unified_approx.report import Report
    from unified_approx.rules import Rule
    from unified_approx.stages import compress_in_stages
    from unified_approx.storage import load, pack, save
    from unified_approx.sweeping import sweep
    from unified_approx.training import Recipe, train
    from unified_approx.unread import remove_unread

# Imported on first use: the command line answers `--help` without loading JAX.
_HOMES = {
    "Budget": "budget",
    "Musco": "multistage",
    "MuscoOptions": "multistage",
    "LcResult": "learning_compression",
    "Plan": "planning",
    "Recipe": "training",
    "Report": "report",
    "Result": "pipeline",
    "Rule": "rules",
    "Schedule": "learning_compression",
    "Sensitivity": "allocation",
    "SgdLStep": "learning_compression",
    "Task": "learning_compression",
    "choose_executions": "latency",
    "compress": "pipeline",
    "compress_in_stages": "stages",
    "direct_compression": "learning_compression",
    "exponential": "learning_compression",
    "fast_lc": "learning_compression",
    "fastest": "latency",
    "fastest_dense": "latency",
    "finetune": "finetuning",
    "finetune_compressed": "learning_compression",
    "informed": "learning_compression",
    "lc": "learning_compression",
    "load": "storage",
    "load_taylor": "learning_compression",
    "match_outputs": "finetuning",
    "musco": "multistage",
    "pack": "storage",
    "parse_tasks": "learning_compression",
    "plan": "pipeline",
    "recalibrate_norms": "recalibration",
    "remove_unread": "unread",
    "save": "storage",
    "sensitivity": "pipeline",
    "sweep": "sweeping",
    "taylor_of": "learning_compression",
    "train": "training",
}
_MODULES = ("datasets", "evaluate", "zoo")

__all__ = [
    "Budget",
    "Musco",
    "MuscoOptions",
    "LcResult",
    "Plan",
    "Recipe",
    "Report",
    "Result",
    "Rule",
    "Schedule",
    "Sensitivity",
    "SgdLStep",
    "Task",
    "choose_executions",
    "compress",
    "compress_in_stages",
    "datasets",
    "direct_compression",
    "evaluate",
    "exponential",
    "fast_lc",
    "fastest",
    "fastest_dense",
    "finetune",
    "finetune_compressed",
    "informed",
    "lc",
    "load",
    "load_taylor",
    "match_outputs",
    "musco",
    "pack",
    "parse_tasks",
    "plan",
    "recalibrate_norms",
    "remove_unread",
    "save",
    "sensitivity",
    "sweep",
    "taylor_of",
    "train",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"unified_approx.{name}")
    if name in _HOMES:
        return getattr(import_module(f"unified_approx.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'unified_approx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
