"""The front door for a network: `plan` what would happen, `compress` it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from flax import nnx

from solvers.layer import LayerOptions
from unified_approx.assemble import assemble
from unified_approx.budget import Budget
from unified_approx.report import ProgressBar, ProgressCallback, Report
from unified_approx.rules import Rule
from unified_approx.run import Calibration, Plan, Run
from unified_approx.settings import Call, make_arguments
from unified_approx.storage import save
from unified_approx.work_dir import WorkDir


@dataclass(frozen=True, kw_only=True)
class Result:
    """A compressed network.

    Attributes:
        model: the new network, an NNX module with the interface of the old one.
        report: what was done, layer by layer.
    """

    model: nnx.Module
    report: Report

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
    rows: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    batch_size: int = 200,
    execution: str = "auto",
    work_dir: str | PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
    call: Call | None = None,
) -> Result:
    """A smaller network that answers like `model` on data like `calibration`.

    Layers are solved in network order: inputs and shortcut branches come from the network compressed so far, targets
    from the original. Each layer minimises ||y - r(x m' + bias + offset)||^2 over the matrices m of its budget.

    Args:
        model: a Flax NNX network; it is not changed. Batch norm must be in evaluation mode.
        calibration: an array of examples (images); or a dict or tuple of arrays with one example axis; or an iterable
            of such batches, or a function that returns one. No labels are needed.
        budget: how much of each selected layer may remain, `Budget(params=0.5)`; or give both penalties.
        lambda_sparse: weight of the l2,1 penalty on the sparse part, a fraction of its largest useful value.
        lambda_rank: weight of the nuclear norm of the low-rank part, likewise.
        rules: which layers, in place of all; the first that matches a layer's name wins.
        form: "best", or one of `solvers.layer.FORM_NAMES`; "admm" is the paper's method.
        group: "column", or "channel" to keep or drop whole input channels.
        options: all options of the layer solver; `form` and `group` override theirs.
        rows: sampled output positions per layer; chosen from the number of features when None.
        held_out: fraction of the examples (the last ones) on which forms and iterates are chosen.
        seed: of the sampled positions.
        batch_size: examples that go through the network at a time.
        execution: how the factored layers run; see `unified_approx.layers.Factored`.
        work_dir: a folder where every solved layer is stored, so that a killed run resumes at the next layer.
        progress: called before and after each layer; a progress bar on a terminal when None.
        call: how the network is called, `call(model, batch)`; `model(batch)` when None.

    Raises:
        ValueError: a bad argument, data or weights that are not finite, batch norm in training mode, no layer to
            compress, a rule that matches nothing, a budget that cannot be reached, or the work folder of another run.
    """
    start = time.perf_counter()
    arguments = make_arguments(
        options=options,
        form=form,
        group=group,
        budget=budget,
        lambda_sparse=lambda_sparse,
        lambda_rank=lambda_rank,
        rules=rules,
        rows=rows,
        held_out=held_out,
        seed=seed,
        batch_size=batch_size,
        execution=execution,
        call=call,
    )
    run = Run(model, calibration, arguments)
    work = None if work_dir is None else WorkDir(work_dir, run.fingerprint())
    modules, layers = run.solve_all(work, progress or ProgressBar())
    new = assemble(model, modules, run.capture.sites)
    return Result(model=new, report=run.report(new, layers, time.perf_counter() - start))


def plan(
    model: nnx.Module,
    calibration: Calibration,
    *,
    budget: Budget | None = None,
    lambda_sparse: float | None = None,
    lambda_rank: float | None = None,
    rules: Sequence[Rule] = (),
    rows: int | None = None,
    held_out: float = 0.1,
    batch_size: int = 200,
    call: Call | None = None,
) -> Plan:
    """What `compress` with these arguments would do; nothing is solved, and the same errors are raised."""
    arguments = make_arguments(
        options=None,
        form=None,
        group=None,
        budget=budget,
        lambda_sparse=lambda_sparse,
        lambda_rank=lambda_rank,
        rules=rules,
        rows=rows,
        held_out=held_out,
        seed=0,
        batch_size=batch_size,
        execution="auto",
        call=call,
    )
    return Run(model, calibration, arguments).plan()
