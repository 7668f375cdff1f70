"""The smallest network that keeps the accuracy: a search over budgets, judged on held-out examples."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int, Shaped

from unified_approx import calibration as examples
from unified_approx.budget import Budget, UnreachableBudgetError
from unified_approx.calling import Call, forward
from unified_approx.evaluate import accuracy, predict
from unified_approx.loop import crops

_TRIALS = 7
_RANGE = (0.01, 0.95)  # of `params`; seven halvings of its logarithm end within 4 % of the smallest
_VIEWS, _SHIFT = 4, 1 / 8  # shifted copies of each held-out image, by at most that much of its sides


def smallest(
    model: nnx.Module,
    calibration: Any,
    labels: Shaped[np.ndarray, " examples"] | None,
    max_drop: float,
    compress: Callable[..., Any],
    arguments: Mapping[str, Any],
) -> Any:
    """Bisects the logarithm of `params` for the smallest budget whose network loses at most `max_drop` points.

    The loss is measured on the held-out calibration examples: with labels, accuracy of the original minus that of the
    trial; without, the share of examples that the two answer differently, which no loss of accuracy exceeds. Images
    count as shifted copies of themselves (edges repeated), because an original that was trained on the very images
    answers these too well. A handful of points are decided by few examples: give enough of them.

    Args:
        model: the original.
        calibration: examples, as `compress` takes them.
        labels: one integer per example, or None.
        max_drop: points.
        compress: of `unified_approx.pipeline`.
        arguments: of every trial, the budget aside; each has a folder of its own in `work_dir`.

    Raises:
        ValueError: labels that do not fit, examples that are not one array, no budget that can be reached, or no trial
            that keeps the accuracy.
    """
    data = examples.gather(calibration)
    count = examples.count(data)
    if labels is not None and np.shape(labels) != (count,):
        raise ValueError(
            f"labels: shape {np.shape(labels)}; give one integer label for each of the {count} calibration examples, "
            "or none, to measure the agreement with the original"
        )
    if not hasattr(data, "ndim"):
        raise ValueError(
            f"calibration: a {type(data).__name__}; Budget(max_drop={max_drop:g}) measures accuracy on one array"
        )
    held = max(1, round(arguments["held_out"] * count))
    drop_of = Judge.of(
        model,
        np.asarray(data[-held:]),
        None if labels is None else np.asarray(labels)[-held:],
        arguments["call"] or forward,
        arguments["seed"],
    )
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
        drop = drop_of(result.model)
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


class Judge(NamedTuple):
    """Points that a network loses against the original, on examples that it has not seen."""

    x: Shaped[np.ndarray, "views ..."]
    answers: Int[np.ndarray, " views"]
    reference: float
    call: Call

    @classmethod
    def of(
        cls, model: nnx.Module, x: np.ndarray, labels: Int[np.ndarray, " held"] | None, call: Call, seed: int
    ) -> "Judge":
        """By labels, else by the original's answers, of which it has 100 %."""
        views = views_of(x, seed)
        if labels is None:
            return cls(views, np.argmax(predict(model, views, call=call), axis=1), 100.0, call)
        answers = np.tile(labels, len(views) // len(x))
        return cls(views, answers, accuracy(model, views, answers, call=call), call)

    def __call__(self, network: nnx.Module) -> float:
        """Points lost; negative where the network does better."""
        return self.reference - accuracy(network, self.x, self.answers, call=self.call)


def views_of(x: Shaped[np.ndarray, "held ..."], seed: int) -> Shaped[np.ndarray, "views ..."]:
    """A few copies of images (height, width, channels), shifted at random; other examples as they are."""
    if x.ndim != 4:
        return x
    rng, (height, width) = np.random.default_rng(seed), x.shape[1:3]
    margins = [round(side * _SHIFT) for side in (height, width)]
    padded = jnp.asarray(np.pad(x, ((0, 0), *((m, m) for m in margins), (0, 0)), mode="edge"))
    corners = [np.stack([rng.integers(0, 2 * m + 1, len(x)) for m in margins], axis=1) for _ in range(_VIEWS)]
    return np.concatenate([np.asarray(crops(padded, jnp.asarray(own), height, width)) for own in corners])
