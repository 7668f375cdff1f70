"""Compression in stages: a little, training, and further from what came out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from flax import nnx

from unified_approx import calibration as examples
from unified_approx.allocation.assign import total_cost
from unified_approx.assemble import get, homes, put
from unified_approx.budget import Budget
from unified_approx.calling import forward
from unified_approx.cost import NetworkCost, network_cost
from unified_approx.layers import Factored
from unified_approx.macs import factored_layers
from unified_approx.narrow import as_dense
from unified_approx.pipeline import Calibration, Result, compress_with
from unified_approx.report import Report
from unified_approx.settings import make_arguments


def compress_in_stages(
    model: nnx.Module,
    calibration: Calibration,
    budgets: Sequence[Budget],
    train: Callable[[Result, int], nnx.Module],
    *,
    work_dir: str | PathLike[str] | None = None,
    **arguments: Any,
) -> Result:
    """Compress to each budget in turn, and train after each.

    Every stage compresses anew the dense layers that the trained factors of the stage before stand for, without the
    channels that were removed by then. Nothing is trained after the solve of a stage but by `train`.

    Args:
        model: the network; it is not changed.
        calibration: as `compress` takes it; it is gathered once.
        budgets: of params, macs or bytes, as fractions of the original, from loose to tight.
        train: `train(result, stage)` gives the network of that stage trained, its structure fixed, for example
            `finetune(result, x, y, original=model).model`; stages count from 0.
        work_dir: a folder for the solved layers of all stages.
        **arguments: of `compress`, for all stages.

    Returns:
        The trained network of the last stage; its report counts against the original.

    Raises:
        ValueError: no budgets, one that is not tighter than the one before or limits time or accuracy, or what
            `compress` raises.
    """
    _check(budgets)
    if arguments.get("sensitivity") is not None:
        raise ValueError("sensitivity: every stage measures its own network; leave it out")
    data, call = examples.gather(calibration), arguments.get("call") or forward
    example = examples.split(data, arguments.get("batch_size", 200))[0]
    original = network_cost(model, example, call=call)
    current, first, result = model, None, None
    for stage, budget in enumerate(budgets):
        left = _of_what_is_left(budget, original, network_cost(as_dense(current), example, call=call))
        folder = None if work_dir is None else Path(work_dir) / f"stage-{stage}"
        result = compress_again(current, data, budget=left, work_dir=folder, **arguments)
        first = first or result.report
        current = train(result, stage)
        result = replace(result, model=current, report=_against(original, first, result.report, budget))
    assert result is not None
    return result


def _check(budgets: Sequence[Budget]) -> None:
    if not budgets:
        raise ValueError("budgets: empty; give at least one")
    for budget in budgets:
        if budget.max_drop is not None or budget.latency is not None:
            raise ValueError(f"budgets: {budget.describe()}; stages take params, macs and bytes")
    for loose, tight in zip(budgets, budgets[1:], strict=False):
        before, after = loose.given(), tight.given()
        if set(before) != set(after) or any(after[name] >= before[name] for name in after):
            raise ValueError(f"budgets: {tight.describe()} is not tighter than {loose.describe()} in the same limits")


def _of_what_is_left(budget: Budget, original: NetworkCost, left: NetworkCost) -> Budget:
    """The budget as fractions of the network that is left."""
    given = budget.given()
    limits = {name: min(1.0, f * total_cost(original, name) / total_cost(left, name)) for name, f in given.items()}
    return Budget(**limits)


def compress_again(model: nnx.Module, calibration: Calibration, **arguments: Any) -> Result:
    """Compress a network that may have factored layers: the dense layers that they stand for.

    Layers that this run leaves as they are keep their factors, and lose only what nothing reads any more.

    Args:
        model: the network; it is not changed.
        calibration: as `compress` takes it.
        **arguments: of `compress`.
    """
    before = factored_layers(model)
    # Without their history, so that what this run removes is seen.
    forms = {path: _with_removed(layer, (0, 0)) for path, layer in before.items()}
    of_run = ("sensitivity", "start", "work_dir", "progress")
    more = {name: arguments.pop(name) for name in of_run if name in arguments}
    result = compress_with(as_dense(model), calibration, make_arguments(**arguments), forms=forms, **more)
    return replace(result, model=_with_history(result.model, before))


def _with_history(model: nnx.Module, before: dict[tuple[str | int, ...], Factored]) -> nnx.Module:
    """The network whose layers know the channels that were ever removed, so that it can be saved and loaded."""
    for path, old in before.items():
        new: Any = get(model, path)
        new = _with_removed(new, (old.removed[0] + new.removed[0], old.removed[1] + new.removed[1]))
        for home in homes(model, path):
            model = put(model, home, new)
    return model


def _with_removed(layer: Factored, removed: tuple[int, int]) -> Factored:
    """The layer with that many input and output channels removed from what it replaces."""
    return type(layer)(list(layer.terms), layer.bias, layer.geometry, layer.execution, layer.dtype, removed)


def _against(original: NetworkCost, first: Report, last: Report, budget: Budget) -> Report:
    """The last stage's report with what the first one started from."""
    rows = {row.name: row for row in first.layers}
    layers = tuple(
        replace(
            row,
            shape=rows[row.name].shape,
            original_params=rows[row.name].original_params,
            original_macs=rows[row.name].original_macs,
        )
        for row in last.layers
    )
    return replace(
        last,
        layers=layers,
        budget=budget.describe(),
        original_params=original.params,
        original_bits=original.bits,
        original_macs=original.macs,
    )
