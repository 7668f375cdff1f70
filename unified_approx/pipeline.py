"""The front door for a network: `plan` what would happen, `compress` it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Shaped

from solvers.layer import LayerOptions
from solvers.sharding import Devices
from unified_approx.allocation import Sensitivity
from unified_approx.allocation.allocate import allocate
from unified_approx.allocation.build import measure_sensitivity
from unified_approx.assemble import assemble
from unified_approx.budget import Budget
from unified_approx.calling import Call
from unified_approx.layers import Factored
from unified_approx.planning import Plan, plan_of
from unified_approx.report import ProgressBar, ProgressCallback, Report, measuring
from unified_approx.rules import Rule
from unified_approx.run import Calibration, Run
from unified_approx.settings import MEASURED, Arguments, make_arguments
from unified_approx.sites import Path
from unified_approx.smallest import smallest
from unified_approx.storage import save
from unified_approx.unread import remove_unread
from unified_approx.work_dir import WorkDir

_ARGUMENTS = {*Arguments.__dataclass_fields__, "form", "group", "options", "round_to"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """A compressed network.

    Attributes:
        model: the new network, an NNX module with the interface of the old one.
        report: what was done, layer by layer.
        sensitivity: the table that the budget was shared by, None if there was none.
        matrices: of the compressed layers by name, what follows them folded in: the `start` of a similar run.
    """

    model: nnx.Module
    report: Report
    sensitivity: Sensitivity | None = None
    matrices: Mapping[str, Float32[np.ndarray, "n p"]] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        r = self.report
        return f"Result({r.budget}: parameters ÷ {r.params_ratio:.2f}, MACs ÷ {r.macs_ratio:.2f})"

    @property
    def budget_met(self) -> bool | None:
        """Whether the budget was met; None when penalties were given."""
        return self.report.budget_met

    def save(self, path: str | PathLike[str]) -> int:
        """Write one safetensors file, to be read with `load`; returns its size in bytes."""
        return save(path, self.model, report=self.report.to_dict())


def compress(
    model: nnx.Module,
    calibration: Calibration,
    *,
    budget: Budget | None = None,
    lambda_sparse: float | None = None,
    lambda_rank: float | None = None,
    rules: Sequence[Rule] = (),
    form: str | None = None,
    group: str | None = None,
    options: LayerOptions | None = None,
    round_to: int | None = None,
    rows: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    batch_size: int = 200,
    execution: str = "auto",
    allocation: str = "kl",
    sensitivity: Sensitivity | None = None,
    labels: Shaped[np.ndarray, " examples"] | None = None,
    start: Mapping[str, Float32[np.ndarray, "n p"]] | None = None,
    work_dir: str | PathLike[str] | None = None,
    devices: Devices | None = None,
    progress: ProgressCallback | None = None,
    call: Call | None = None,
) -> Result:
    """A smaller network that answers like `model` on data like `calibration`.

    Layers are solved in network order: inputs and shortcut branches come from the network compressed so far, targets
    from the original. Each layer minimises ||y - r(x m' + bias + offset)||^2 over the matrices m of its budget. Output
    channels that no later layer reads any more are removed at the end, which changes no output (`remove_unread`).

    Args:
        model: a Flax NNX network; it is not changed. Batch norm must be in evaluation mode.
        calibration: an array of examples (images); or a dict or tuple of arrays with one example axis; or an iterable
            of such batches, or a function that returns one. No labels are needed.
        budget: how much of the network may remain, `Budget(params=0.5)`, or how much accuracy may go; or give both
            penalties.
        lambda_sparse: weight of the l2,1 penalty on the sparse part, a fraction of its largest useful value.
        lambda_rank: weight of the nuclear norm of the low-rank part, likewise.
        rules: which layers, in place of all; the first that matches a layer's name wins.
        form: "best", or one of `solvers.layer.FORM_NAMES`; "admm" is the paper's method.
        group: "column", or "channel" to keep or drop whole input channels.
        options: all options of the layer solver; `form`, `group` and `round_to` override theirs.
        round_to: numbers of kept columns or channels and ranks are rounded down to multiples of it, 8 for example.
        rows: sampled output positions per layer; chosen from the number of features when None.
        held_out: fraction of the examples (the last ones) on which forms and iterates are chosen.
        seed: of the sampled positions.
        batch_size: examples that go through the network at a time.
        execution: how the factored layers run: "auto" (fewest multiply-adds), "fastest" (on this machine, by
            `ua.fastest` on batches of 64), or a name from `unified_approx.layers.Factored`.
        allocation: how the budget is shared among the layers: "kl" (by the measured effect of each layer's error on the
            network's output), "fisher" (by its second-order expansion), or "uniform" (the same fraction for all).
        sensitivity: a table from `ua.sensitivity`, so that it is not measured again.
        labels: of the calibration examples, integers; only read by `Budget(max_drop=...)`, which without them takes the
            original's answers for right.
        start: matrices to start the penalised ADMM from, by layer, as in `Result.matrices` of a similar run.
        work_dir: a folder where every solved layer is stored, so that a killed run resumes at the next layer.
        devices: how many devices, or which, share the rows of every layer while it is solved; None: the default one.
            With n devices up to n - 1 of a layer's rows are left out, and layers of few rows are not split; otherwise
            the results differ by rounding only.
        progress: called before and after each layer; a progress bar on a terminal when None.
        call: how the network is called, `call(model, batch)`; `model(batch)` when None.

    Raises:
        ValueError: a bad argument, data or weights that are not finite, batch norm in training mode, no layer to
            compress, a rule that matches nothing, a budget that cannot be reached, or the work folder of another run.
    """
    given = {name: value for name, value in locals().items() if name in _ARGUMENTS}
    if budget is not None and budget.max_drop is not None:
        rest = {"sensitivity": sensitivity, "work_dir": work_dir, "progress": progress}
        return smallest(model, calibration, labels, budget.max_drop, compress, {**given, **rest})
    more: dict[str, Any] = {"sensitivity": sensitivity, "start": start, "work_dir": work_dir, "progress": progress}
    return compress_with(model, calibration, make_arguments(**given), **more)


def compress_with(
    model: nnx.Module,
    calibration: Calibration,
    arguments: Arguments,
    *,
    sensitivity: Sensitivity | None = None,
    start: Mapping[str, Float[np.ndarray, "n p"]] | None = None,
    work_dir: str | PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
    forms: Mapping[Path, Factored] | None = None,
) -> Result:
    """`compress`, its arguments checked.

    Args:
        model: as in `compress`.
        calibration: likewise.
        arguments: all that describe the run.
        sensitivity: as in `compress`.
        start: likewise.
        work_dir: likewise.
        progress: likewise.
        forms: layers by path that compute what the model's do, for those that this run leaves as they are.
    """
    clock = time.perf_counter()
    run = Run(model, calibration, arguments)
    work = None if work_dir is None else WorkDir(work_dir, run.fingerprint())
    progress = progress or ProgressBar()
    if sensitivity is None and work is not None:
        sensitivity = work.sensitivity()
    allocated = None if work is None else work.allocation()
    if allocated is None:
        table = allocate(run, sensitivity, lambda i, n, name: progress(measuring(i, n, name)))
        if work is not None:
            work.keep_allocation(run.allocation(), table)
    else:
        table = sensitivity
        run.allocate(allocated)
    modules, layers = run.solve_all(work, progress, start or {})
    new = assemble(model, {**(forms or {}), **modules}, run.capture.sites)
    new, removed = remove_unread(new, run.example, run.arguments.call)
    fast = run.settled(new)
    report = run.report(new, fast, layers, removed, time.perf_counter() - clock)
    return Result(model=fast, report=report, sensitivity=table, matrices=run.matrices)


def plan(
    model: nnx.Module,
    calibration: Calibration,
    *,
    budget: Budget | None = None,
    lambda_sparse: float | None = None,
    lambda_rank: float | None = None,
    rules: Sequence[Rule] = (),
    form: str | None = None,
    group: str | None = None,
    options: LayerOptions | None = None,
    round_to: int | None = None,
    rows: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    batch_size: int = 200,
    allocation: str = "kl",
    sensitivity: Sensitivity | None = None,
    call: Call | None = None,
) -> Plan:
    """What `compress` with these arguments would do; nothing is solved, and the same errors are raised.

    With a budget and an allocation other than "uniform" the sensitivity is measured, if no table is given; the plan has
    the table.
    """
    given = {name: value for name, value in locals().items() if name in _ARGUMENTS}
    if budget is not None and budget.max_drop is not None:
        raise ValueError(f"budget: {budget.describe()} is found by trial; plan a budget of params, macs or bytes")
    run = Run(model, calibration, make_arguments(**given))
    show = ProgressBar()
    table = allocate(run, sensitivity, lambda i, n, name: show(measuring(i, n, name)))
    return replace(plan_of(run), sensitivity=table)


def sensitivity(
    model: nnx.Module,
    calibration: Calibration,
    *,
    method: str = "kl",
    timed: bool = False,
    rules: Sequence[Rule] = (),
    form: str | None = None,
    group: str | None = None,
    options: LayerOptions | None = None,
    round_to: int | None = None,
    rows: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    batch_size: int = 200,
    progress: ProgressCallback | None = None,
    call: Call | None = None,
) -> Sensitivity:
    """How the network's output feels each layer's error: measured once, it serves every budget.

    Args:
        model: the network; this and all others as in `compress`, and the same there as here, or it refuses the table.
        calibration: examples.
        rules: layers that they keep, or give budgets of their own, are left out.
        form: whole channels and ranks are measured where it asks for them.
        group: "column" or "channel".
        options: of the layer solver; `form`, `group` and `round_to` override theirs.
        round_to: accepted for calls with the arguments of `compress`; sizes are rounded after they are chosen.
        rows: sampled output positions per layer; chosen when None.
        held_out: fraction of the examples.
        seed: of the sampled positions.
        batch_size: examples that go through the network at a time.
        progress: called before each layer.
        call: how the network is called.
        method: "kl" (each layer alone, at four sizes) or "fisher" (the second-order expansion, at one).
        timed: time every size on this machine, as a budget of latency needs.

    Raises:
        ValueError: as `compress`.
    """
    if method not in MEASURED:
        raise ValueError(f"method: {method!r} is unknown; choose {' or '.join(MEASURED)}")
    given = {name: value for name, value in locals().items() if name in _ARGUMENTS}
    run = Run(
        model,
        calibration,
        make_arguments(**given, allocation=method, budget=Budget(params=1.0, latency=1.0 if timed else None)),
    )
    show = progress or ProgressBar()
    return measure_sensitivity(run, method, lambda index, total, name: show(measuring(index, total, name)))
