"""The smallest network that keeps the accuracy: a search over budgets, judged on held-out examples."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from unified_approx import calibration as examples
from unified_approx.budget import Budget, UnreachableBudgetError
from unified_approx.calling import forward
from unified_approx.evaluate import accuracy

_TRIALS = 7
_RANGE = (0.01, 0.95)  # of `params`; seven halvings of its logarithm end within 4 % of the smallest


def smallest(
    model: nnx.Module,
    calibration: Any,
    labels: Shaped[np.ndarray, " examples"] | None,
    max_drop: float,
    compress: Callable[..., Any],
    arguments: Mapping[str, Any],
) -> Any:
    """Bisects the logarithm of `params` for the smallest budget whose network loses at most `max_drop` points.

    Accuracies of the original and of every trial are measured on the same held-out calibration examples, with their
    labels. A handful of points are decided by few examples: give enough of them.

    Args:
        model: the original.
        calibration: examples, as `compress` takes them.
        labels: one integer per example.
        max_drop: points.
        compress: of `unified_approx.pipeline`.
        arguments: of every trial, the budget aside; each has a folder of its own in `work_dir`.

    Raises:
        ValueError: labels are missing or do not fit, examples that are not one array, no budget that can be reached, or
            no trial that keeps the accuracy.
    """
    data = examples.gather(calibration)
    count = examples.count(data)
    if labels is None or np.shape(labels) != (count,):
        raise ValueError(
            f"labels: Budget(max_drop={max_drop:g}) measures accuracy; give one integer label for each of the {count} "
            f"calibration examples, not {None if labels is None else np.shape(labels)}"
        )
    if not hasattr(data, "ndim"):
        raise ValueError(
            f"calibration: a {type(data).__name__}; Budget(max_drop={max_drop:g}) measures accuracy on one array"
        )
    held = max(1, round(arguments["held_out"] * count))
    call = arguments["call"] or forward
    x, y = jax.tree.map(lambda a: a[-held:], data), np.asarray(labels)[-held:]
    reference = accuracy(model, x, y, call=call)
    low, high, best, table = *map(log, _RANGE), None, arguments["sensitivity"]
    unreachable: UnreachableBudgetError | None = None
    tried = 0
    for _ in range(_TRIALS):
        middle = (low + high) / 2
        trial = {**arguments, "budget": Budget(params=exp(middle)), "sensitivity": table}
        if arguments["work_dir"] is not None:
            trial["work_dir"] = Path(arguments["work_dir"]) / f"params{exp(middle):.5f}"
        try:
            result = compress(model, data, **trial)
        except UnreachableBudgetError as error:
            low, unreachable = middle, error
            continue
        tried += 1
        table = result.sensitivity
        drop = reference - accuracy(result.model, x, y, call=call)
        if drop <= max_drop:
            report = replace(result.report, budget=f"max_drop={max_drop:g}", drop=drop)
            best, high = replace(result, report=report), middle
        else:
            low = middle
    if unreachable is not None and not tried:
        raise unreachable
    if best is None:
        raise ValueError(
            f"budget: max_drop={max_drop:g} was not kept by any of {tried} networks down from params={_RANGE[1]:g} "
            f"on {held} held-out examples; allow a larger drop, or give more examples"
        )
    return best
