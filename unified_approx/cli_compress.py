"""The command `compress`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from unified_approx.cli_common import (
    BUDGET_NOT_MET,
    Data,
    DataName,
    Debug,
    Json,
    Network,
    Weights,
    check_outputs,
    command_line,
    console,
    errors,
)
from unified_approx.memory import compact

if TYPE_CHECKING:
    from unified_approx.pipeline import Plan, Result


def compress(
    network: Network,
    weights: Weights = None,
    data: Data = None,
    dataset: DataName = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Fractions of the network that may remain: params=0.5, macs=0.5, bytes=0.5, several with commas; or "
            "max_drop=POINTS of accuracy.  [default: params=0.5]"
        ),
    ] = None,
    lambda_sparse: Annotated[
        float | None, typer.Option(help="In place of a budget: weight of the sparse part, a fraction of its max.")
    ] = None,
    lambda_rank: Annotated[
        float | None, typer.Option(help="In place of a budget: weight of the low-rank part, a fraction of its max.")
    ] = None,
    group: Annotated[str, typer.Option(help="What the sparse part keeps whole: column or channel.")] = "column",
    form: Annotated[
        str, typer.Option(help="best, columns, low_rank, sum, two_level, spatial or admm (the paper's method).")
    ] = "best",
    round_to: Annotated[
        int, typer.Option(help="Round kept columns and ranks down to multiples of this, 8 for example.")
    ] = 1,
    m_step: Annotated[str, typer.Option(help="M step of the ADMM: mm (no learning rate) or sgd (the paper's).")] = "mm",
    calibration: Annotated[int, typer.Option(help="Training images to calibrate on.")] = 2000,
    rows: Annotated[int | None, typer.Option(help="Sampled output positions per layer.")] = None,
    seed: Annotated[int, typer.Option(help="Of the images and positions that are drawn.")] = 0,
    allocation: Annotated[
        str, typer.Option(help="How the budget is shared among the layers: kl, fisher or uniform.")
    ] = "kl",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX",
            help="Leave these layers as they are; may be repeated. Every layer is compressed unless this says "
            "otherwise; to keep the first and the last layer (--keep conv1 --keep fc) is usual.",
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="Devices that share the rows of every layer.  [default: one]")
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Folder for solved layers: a killed run resumes at the next layer.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    out: Annotated[Path | None, typer.Option(help="Save the compressed network here (safetensors).")] = None,
    json_file: Json = None,
    debug: Debug = False,
) -> None:
    """Compress a trained network layer by layer, without training."""
    start, command = time.perf_counter(), command_line("compress", locals())
    with errors(debug):
        check_outputs(out=out, json=json_file)
        settings = _settings(budget, lambda_sparse, lambda_rank, keep)
        settings |= {"allocation": allocation, "options": _options(form, group, m_step, round_to)}
        settings |= {"rows": rows, "seed": seed}
        from solvers.sharding import row_mesh
        from unified_approx import comparison, pipeline, resolve
        from unified_approx.evaluate import accuracy

        row_mesh(1 if devices is None else devices)  # raises for too many before anything is loaded
        model = resolve.load_network(network, weights)
        images = resolve.load_images(network, data, dataset)
        chosen = resolve.calibration_indices(len(images.x_train), calibration, seed)
        examples, labels = images.x_train[chosen], images.y_train[chosen]
        screen = console()
        if dry_run:
            _show_plan(screen, pipeline.plan(model, examples, **settings))
            return
        reference = accuracy(model, images.x_test, images.y_test)
        with compact():
            result = pipeline.compress(model, examples, labels=labels, work_dir=work_dir, devices=devices, **settings)
        result = comparison.with_fastest_executions(result, images.x_test)
        test = {"x_test": images.x_test, "y_test": images.y_test, "reference_accuracy": reference}
        row = comparison.compare(network, model, result, **test, out=out, form=form, group=group, m_step=m_step)
        _show_result(screen, result, row)
        if json_file is not None:
            _write(command, json_file, row, start, seed, result)
        _check_budget_met(result)


def _check_budget_met(result: "Result") -> None:
    if result.budget_met is False:
        typer.echo(f"unified-approx: the budget {result.report.budget} was not met", err=True)
        raise typer.Exit(BUDGET_NOT_MET)


def _settings(
    budget: str | None, lambda_sparse: float | None, lambda_rank: float | None, keep: list[str] | None
) -> dict[str, Any]:
    from unified_approx.budget import Budget
    from unified_approx.rules import Rule

    if budget is None and lambda_sparse is None and lambda_rank is None:
        budget = "params=0.5"
    return {
        "budget": None if budget is None else Budget.parse(budget),
        "lambda_sparse": lambda_sparse,
        "lambda_rank": lambda_rank,
        "rules": [Rule(path=pattern, keep=True) for pattern in keep or ()],
    }


def _options(form: str, group: str, m_step: str, round_to: int) -> Any:
    from dataclasses import replace

    from solvers.layer import LayerOptions
    from solvers.m_step import MajorizeMinimize
    from solvers.sgd import Sgd

    m_steps = {"mm": MajorizeMinimize, "sgd": Sgd}
    if m_step not in m_steps:
        raise ValueError(f"--m-step: {m_step!r} is unknown; choose {' or '.join(m_steps)}")
    options = LayerOptions(form=form, group=group, round_to=round_to)
    return replace(options, admm=replace(options.admm, m_step=m_steps[m_step]()))


def _show_plan(console: Console, plan: "Plan") -> None:
    table = Table(title="what would be compressed")
    headings = ("layer", "n × p", "values now", "values asked for", "least possible", "expected loss (nats)", "rows")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in plan.layers:
        n, p = row["shape"]
        asked = "by penalties" if row["values"] is None else f"{row['values']:,.0f}"
        loss = "" if row["expected_loss"] is None else f"{row['expected_loss']:.2g}"
        figures = (f"{n * p:,}", asked, f"{row['minimum']:,.0f}", loss, f"{row['rows']:,}")
        table.add_row(row["name"], f"{n} × {p}", *figures)
    console.print(table)
    if plan.gap is not None:
        console.print(f"no other choice of sizes is expected to lose more than {plan.gap:.2%} less")
    if plan.kept:
        console.print(f"kept by rule: {', '.join(plan.kept)}")
    for name, reason in plan.dense:
        console.print(f"left as it is: {name}: {reason}")
    for name, reason in plan.skipped:
        console.print(f"skipped: {name}: {reason}")
    console.print(
        f"smallest reachable budget params={plan.minimum_params:.4f}; about {plan.memory_mb:,.0f} MB and "
        f"{plan.seconds:,.0f} s"
    )


def _show_result(console: Console, result: "Result", row: dict[str, Any]) -> None:
    from unified_approx.comparison import comparison_table, speed_sentence

    console.print(result.report.table())
    console.print(comparison_table(row, result))
    console.print(speed_sentence(row))
    for warning in result.report.warnings:
        console.print(f"warning: {warning}")


def _write(command: str, path: Path, row: dict[str, Any], start: float, seed: int, result: "Result") -> None:
    from unified_approx.comparison import layer_rows
    from unified_approx.results import write_results

    write_results(
        path,
        command,
        [row],
        seconds=time.perf_counter() - start,
        seed=seed,
        repeat_row=True,
        layers=layer_rows(result),
        budget_met=result.budget_met,
    )
