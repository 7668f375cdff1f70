"""The commands `sweep` and `plot`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from unified_approx.cli_common import Data, DataName, Debug, Network, Weights, console, errors

AXES = ("cr", "macs", "speedup")


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: {text!r} is not understood; write numbers separated by commas") from None


def _budgets(text: str | None) -> list[Any] | None:
    if text is None or "=" not in text:
        return _numbers("budgets", text)
    from unified_approx.budget import Budget

    return [Budget.parse(part) for part in text.split(";")]


def _limits_drop(budgets: list[Any] | None) -> bool:
    return any(getattr(budget, "max_drop", None) is not None for budget in budgets or ())


def sweep(
    network: Network,
    weights: Weights = None,
    data: Data = None,
    dataset: DataName = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Fractions of the parameters: 0.7,0.5,0.3; or any budgets: 'macs=0.5;params=0.3,macs=0.4'."),
    ] = None,
    lambda_sparse: Annotated[
        str | None, typer.Option(help="Penalties on the sparse part, fractions of their maximum: 0.1,0.05,0.02.")
    ] = None,
    lambda_rank: Annotated[str | None, typer.Option(help="Penalties on the low-rank part, likewise.")] = None,
    form: Annotated[str, typer.Option(help="As in compress.")] = "best",
    group: Annotated[str, typer.Option(help="As in compress.")] = "column",
    round_to: Annotated[int, typer.Option(help="As in compress.")] = 1,
    keep: Annotated[list[str] | None, typer.Option(metavar="REGEX", help="As in compress.")] = None,
    allocation: Annotated[str, typer.Option(help="As in compress.")] = "kl",
    calibration: Annotated[int, typer.Option(help="Training images to calibrate on.")] = 2000,
    rows: Annotated[int | None, typer.Option(help="Sampled output positions per layer.")] = None,
    seed: Annotated[int, typer.Option(help="Of the images and positions that are drawn.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that solve points side by side.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a dask.distributed scheduler, in place of processes of this machine.")
    ] = None,
    networks: Annotated[Path | None, typer.Option(help="Folder for the compressed networks.")] = None,
    timed: Annotated[bool, typer.Option(help="Measure each point's speed against the original.")] = False,
    out: Annotated[Path, typer.Option(help="Parquet file; a killed sweep goes on from it.")] = Path("sweep.parquet"),
    debug: Debug = False,
) -> None:
    """Compress at many budgets or penalties; one row per point."""
    with errors(debug):
        from unified_approx import resolve, sweeping
        from unified_approx.rules import Rule

        if workers < 1:
            raise ValueError(f"--workers: {workers}; give at least 1")
        points = {"lambda_sparse": lambda_sparse, "lambda_rank": lambda_rank}
        lists: dict[str, Any] = {name: _numbers(name.replace("_", "-"), text) for name, text in points.items()}
        lists["budgets"] = _budgets(budgets)
        model = resolve.load_network(network, weights)
        images = resolve.load_images(network, data, dataset)
        chosen = resolve.calibration_indices(len(images.x_train), calibration, seed)
        examples = images.x_train[chosen]
        screen = console()

        def show(done: int, total: int, row: dict[str, Any]) -> None:
            screen.print(f"{done}/{total}: {_target(row)}: accuracy {row['accuracy']:.2f} %, CR {row['cr']:.2f}")

        labels: dict[str, Any] = {} if not _limits_drop(lists["budgets"]) else {"labels": images.y_train[chosen]}
        with _executor(workers, scheduler) as executor:
            found = sweeping.sweep(
                model,
                examples,
                **lists,
                test=(images.x_test, images.y_test),
                out=out,
                executor=executor,
                progress=show,
                networks=networks,
                timed=timed,
                rules=[Rule(path=pattern, keep=True) for pattern in keep or ()],
                form=form,
                group=group,
                round_to=round_to,
                allocation=allocation,
                rows=rows,
                seed=seed,
                **labels,
            )
        screen.print(_table(found))
        screen.print(f"written to {out}")


def _executor(workers: int, scheduler: str | None) -> Any:
    from concurrent.futures import ProcessPoolExecutor
    from contextlib import nullcontext
    from multiprocessing import get_context

    if scheduler is not None:
        try:
            from distributed import Client
        except ImportError:
            raise ValueError("--scheduler: needs dask; pip install 'unified-approx[distributed]'") from None
        return Client(scheduler, timeout=20).get_executor()
    # A fork of a process that has started JAX's threads hangs.
    return nullcontext(None) if workers == 1 else ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _target(row: dict[str, Any]) -> str:
    if row["budget"] is not None:
        return row["budget"]
    return f"lambda_sparse={row['lambda_sparse']:g}, lambda_rank={row['lambda_rank']:g}"


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    for heading in ("point", "accuracy", "CR", "MACs ÷", "s"):
        table.add_column(heading, justify="left" if heading == "point" else "right")
    for row in rows:
        figures = (f"{row['accuracy']:.2f}", f"{row['cr']:.2f}", f"{row['macs_ratio']:.2f}", f"{row['seconds']:.0f}")
        table.add_row(_target(row), *figures)
    return table


def plot(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files of sweep (Parquet) or results (JSON), one per curve.")
    ],
    out: Annotated[Path, typer.Option(help="Picture to write: PNG, PDF or SVG.")] = Path("tradeoff.png"),
    axis: Annotated[str, typer.Option(help="Against what: cr, macs or speedup.")] = "cr",
    debug: Debug = False,
) -> None:
    """Accuracy against compression, one curve per file and method; points that none beats are marked."""
    with errors(debug):
        if axis not in AXES:
            raise ValueError(f"--axis: {axis!r} is unknown; choose one of {', '.join(AXES)}")
        from unified_approx import plots
        from unified_approx.results import read_rows

        series: dict[str, list[tuple[float, float]]] = {}
        references = set()
        several = len({file.stem for file in files}) < len(files)  # a/sweep.parquet and b/sweep.parquet
        key = "macs_ratio" if axis == "macs" else axis
        for file in files:
            for row in read_rows(file):
                if row.get(key) is None or row.get("accuracy") is None:
                    continue
                name = " ".join(str(row[k]) for k in ("network", "method") if k in row) or str(
                    file if several else file.stem
                )
                series.setdefault(name, []).append((row[key], row["accuracy"]))
                references |= {row["reference_accuracy"]} if row.get("reference_accuracy") else set()
        if not series:
            raise ValueError(f"FILE: none of {', '.join(map(str, files))} has rows with {key} and accuracy")
        reference = references.pop() if len(references) == 1 else None  # of several networks none can be drawn
        console().print(f"written to {plots.tradeoff(out, series, axis=axis, reference=reference)}")
