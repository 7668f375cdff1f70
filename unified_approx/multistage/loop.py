"""The front door of multi-stage compression."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Shaped

from solvers.factor_sizes import Ranks
from solvers.rank_rules import Evbmf, RankRule
from unified_approx.budget import Budget
from unified_approx.multistage.compressor import Musco
from unified_approx.multistage.options import MuscoOptions, Step
from unified_approx.pipeline import Calibration, Result
from unified_approx.report import ProgressCallback

Train = Callable[[Result, int], nnx.Module]
_EVBMF = Evbmf()


def musco(
    model: nnx.Module,
    calibration: Calibration,
    *,
    rank_rule: RankRule | None = _EVBMF,
    decomposition: str = "tucker2",
    layers_per_step: int | None = None,
    stages: int = 1,
    train: Train | None = None,
    ranks: Mapping[str, Ranks | None] | None = None,
    keep: Sequence[str] = (),
    target: Budget | None = None,
    data_aware: bool = True,
    round_to: int = 1,
    labels: Shaped[np.ndarray, " examples"] | None = None,
    work_dir: str | PathLike[str] | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: ProgressCallback | None = None,
    **arguments: Any,
) -> Result:
    """Factor some layers, train, go on with the next ones, and around again with smaller ranks.

    Stops when all passes are made, the target is reached, or a whole pass changed nothing. A layer that would not
    become smaller, or would need more multiply-adds, stays as it is, with the reason in the report. Layers that are
    factored already, by an earlier step or before, are factored anew, from the matrix that they stand for, by the ranks
    of their core. Grouped convolutions stay dense and are listed.

    Args:
        model: a Flax NNX network; it is not changed.
        calibration: examples, as `compress` takes them.
        rank_rule: of `solvers.rank_rules`; None: only the layers in `ranks` are compressed.
        decomposition: of convolutions with a window: "tucker2", "cp3", "cp4", "spatial" or "low_rank"; 1x1 convolutions
            and dense layers become two low-rank factors.
        layers_per_step: layers between two trainings; None: all.
        stages: passes over the layers, at most.
        train: `train(result, step)` gives the network of that step trained, its structure fixed, for example
            `finetune(result, x, y, original=model).model`; steps count from 1. None: no training.
        ranks: by layer name, in place of the rule's: (r,), for "tucker2" (outputs, inputs); None leaves a layer alone.
        keep: regular expressions for whole names of further layers to leave alone.
        target: stop once the whole network is within it: `Budget(params=..., macs=..., bytes=...)`.
        data_aware: fit each layer's response on the calibration data; otherwise its weights alone, as the paper does.
        round_to: ranks are rounded down to multiples of it.
        labels: of the examples, for rules that measure accuracy.
        work_dir: a folder from which a killed run goes on with the same layer, or the same training.
        on_step: called after every step.
        progress: as `compress` takes it.
        **arguments: of `compress`: rows, held_out, seed, batch_size, execution, devices, call.

    Raises:
        ValueError: a bad argument, ranks that do not fit, patterns that match nothing, labels that are missing, the
            work folder of another run, or what `compress` raises.
    """
    options = MuscoOptions(
        rank_rule=rank_rule,
        decomposition=decomposition,
        layers_per_step=layers_per_step,
        stages=stages,
        ranks=ranks,
        keep=keep,
        target=target,
        data_aware=data_aware,
        round_to=round_to,
    )
    more = {"labels": labels, "work_dir": work_dir, "progress": progress, **arguments}
    compressor = Musco(model, calibration, options, **more)
    while True:
        if train is not None and compressor.awaits_training:  # at first only in a run that was killed in training
            compressor.model = train(compressor.result(), compressor.num_steps)
        if compressor.done:
            break
        step = compressor.compression_step()
        if on_step is not None:
            on_step(step)
    return compressor.result()
