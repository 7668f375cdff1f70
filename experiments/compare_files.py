"""Networks that different methods made, in one table and one plot: accuracy, multiply-adds, size on disk, speed.

    python experiments/compare_files.py ADMM=FILE MUSCO=FILE LC=FILE "Deep Compression=FILE"
        [--network resnet20] [--data DIR] [--models DIR]

Any files that `ua.save`, `LcResult.save` or `ua.pack` wrote. All are measured in one run, on the same images, against
the published original in its fastest dense form; every network is packed, so that files can be compared.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import jax
import published
import typer
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import unified_approx as ua
from unified_approx import comparison, datasets, evaluate, zoo
from unified_approx.cost import network_cost
from unified_approx.latency import fastest
from unified_approx.results import network_row, write_results

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("name", "accuracy", "params_ratio", "macs_ratio", "bytes_ratio", "speedup", "speedup_batch1")
AXES = {"macs_ratio": "multiply-adds ÷", "bytes_ratio": "packed bytes ÷", "speedup": "measured speed-up, batch 64"}


def named(text: str) -> tuple[str, Path]:
    """NAME=FILE."""
    name, _, file = text.partition("=")
    if not file or not Path(file).is_file():
        raise typer.BadParameter(f"{text!r}: give NAME=FILE, a file that is there")
    return name, Path(file)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over each of the three."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (field, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for row in rows:
            axes.plot(row[field], row["accuracy"], "o", label=row["name"])
        axes.axhline(rows[0]["reference_accuracy"], color="0.6", linewidth=0.8)
        axes.set(xlabel=label, xscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


def main(
    files: Annotated[list[str], typer.Argument(metavar="NAME=FILE...")],
    network: str = "resnet20",
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    work_dir: Annotated[Path, typer.Option(help="Packed networks.")] = Path(".compare_files"),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure all of them."""
    start, chosen = time.perf_counter(), [named(text) for text in files]
    entry = zoo.entry(network)
    images = datasets.load(entry.dataset, data)
    original = published.load(network, models)
    x, y = entry.preprocess(images.x_test, images), images.y_test
    work_dir.mkdir(parents=True, exist_ok=True)
    reference, before = evaluate.accuracy(original, x, y), network_cost(original, x[:2])
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(original, nnx.Not(nnx.RngState))))
    rows = []
    for name, file in chosen:
        model = fastest(ua.load(file), x[:64])
        cost = network_cost(model, x[:2])
        times = comparison.latencies(original, model, x)
        size = ua.pack(work_dir / f"{name}.uapk", model)
        rows.append(
            network_row(
                network=network,
                method=name,
                budget="",
                reference_accuracy=reference,
                accuracy=evaluate.accuracy(model, x, y),
                params_ratio=before.params / cost.params,
                cr=before.bits / cost.bits,
                macs_ratio=before.macs / cost.macs,
                bytes_ratio=dense / size,
                file_bytes=size,
                speedup=times["original_ms"] / times["compressed_ms"],
                speedup_batch1=times["original_ms_batch1"] / times["compressed_ms_batch1"],
                name=name,
            )
        )
    out = json_file or RESULTS / f"methods-{network}.json"
    command = f"python experiments/compare_files.py --network {network} " + " ".join(f"{n}=FILE" for n, _ in chosen)
    write_results(out, command, rows, seconds=time.perf_counter() - start, seed=0)
    draw(rows, out.with_suffix(".png"))
    table = Table(title=f"{network}, original {reference:.2f} %")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        table.add_row(row["name"], *(f"{row[column]:.2f}" for column in COLUMNS[1:]))
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
