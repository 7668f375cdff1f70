"""Iterative magnitude pruning: the smallest weights go, what is left is trained with the zeros held, and on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Shaped

from solvers.compressions import PruneBelow, PruneL0
from unified_approx.finetuning import RECIPE
from unified_approx.learning_compression import LcResult, Step, Task, direct_compression, finetune_compressed
from unified_approx.training import Recipe


def gradual(kept: float, steps: int, start: float = 1.0) -> tuple[float, ...]:
    """Fractions that stay after each step, many going at first: Zhu & Gupta (2017), equation 1.

    Args:
        kept: after the last step.
        steps: how many.
        start: before the first.

    Raises:
        ValueError: fractions out of order or range, or no steps.
    """
    if not 0 < kept <= start <= 1:
        raise ValueError(f"kept, start: {kept}, {start}; give 0 < kept <= start <= 1")
    if steps < 1:
        raise ValueError(f"steps: {steps}; give at least 1")
    return tuple(kept + (start - kept) * (1 - t / steps) ** 3 for t in range(1, steps + 1))


def prune(
    model: nnx.Module,
    x: Shaped[np.ndarray | Array, "examples ..."],
    y: Int[np.ndarray | Array, " labels"],
    kept: Mapping[str, float | PruneBelow | Sequence[float | PruneBelow]],
    *,
    recipe: Recipe = RECIPE,
    checkpoint_dir: str | PathLike[str] | None = None,
    progress: Callable[[LcResult, LcResult], None] | None = None,
    **arguments: Any,
) -> LcResult:
    """Prune a network step by step and train it after each with its zeros held (projected gradient descent).

    Han et al. (2015), Learning both weights and connections. Han et al. (2016), section 2.

    Args:
        model: the network; it is not changed.
        x: training images, as the augmentation of the recipe wants them.
        y: labels.
        kept: by regular expression for whole names of layers: the fraction of weights that stay; several for as many
            steps, for example `gradual(0.08, 5)`; or `PruneBelow`, a threshold in standard deviations, or several. What
            is zero stays zero.
        recipe: of the training after every step. `RegularizedCrossEntropy` as `objective` adds penalties to it.
        checkpoint_dir: a folder with a folder for each step, from which a killed run goes on.
        progress: called after every step with the network before and after it was trained.
        **arguments: of `unified_approx.train`: a teacher, validation and so on.

    Returns:
        The network; its history has a line for every step, whose loss is half the squared change of the weights.

    Raises:
        ValueError: a fraction out of range or that grows, layers that are named twice or not at all; as `train`.
    """
    schedules = {pattern: _schedule(pattern, value) for pattern, value in kept.items()}
    steps = max((len(s) for s in schedules.values()), default=0)
    if steps == 0:
        raise ValueError("kept: empty; give at least one layer and a fraction, for example {'fc.*': 0.1}")
    lines, done = list[Step](), list[LcResult]()
    for step in range(steps):
        tasks = [Task(path=pattern, compression=s[min(step, len(s) - 1)]) for pattern, s in schedules.items()]
        pruned = direct_compression(done[-1].model if done else model, tasks)
        lines.append(replace(pruned.history[0], step=step))
        folder = None if checkpoint_dir is None else FilePath(checkpoint_dir) / f"step{step}"
        trained = finetune_compressed(pruned, x, y, recipe, checkpoint_dir=folder, **arguments)
        if progress is not None:
            progress(pruned, trained)
        done.append(trained)
    return replace(done[-1], history=tuple(lines), best=steps - 1)


def _schedule(
    pattern: str, kept: float | PruneBelow | Sequence[float | PruneBelow]
) -> tuple[PruneL0 | PruneBelow, ...]:
    given = list(kept) if isinstance(kept, Sequence) else [kept]
    fractions = [each for each in given if not isinstance(each, PruneBelow)]
    in_order = sorted(fractions, reverse=True) == fractions and all(0 < f <= 1 for f in fractions)
    if not given or not in_order or 0 < len(fractions) < len(given):
        raise ValueError(
            f"kept: {kept} of {pattern!r}; give fractions in (0, 1], none larger than the one before, or PruneBelow"
        )
    return tuple(each if isinstance(each, PruneBelow) else PruneL0(float(each)) for each in given)
