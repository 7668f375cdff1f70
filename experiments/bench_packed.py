"""How fast packed files are read: VGG-16 with a tenth of its weights left, and as it is.

    python experiments/bench_packed.py [--quick]

Weights are drawn at random, whole layers pruned by magnitude to the fraction kept; the times do not depend on their
values. Decoding is from bytes in memory to arrays, loading from a file to a network; medians of rounds.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from flax import nnx

import unified_approx as ua
from unified_approx import zoo
from unified_approx.deep_compression import as_pruned, with_masks
from unified_approx.packing import container
from unified_approx.pieces import parameters_of
from unified_approx.results import check, write_results

RESULT = Path(__file__).parent / "results" / "bench_packed.json"


def pruned(model: nnx.Module, kept: float) -> nnx.Module:
    """The fraction of largest size of every kernel, the rest zero."""
    kernels = {path: value for path, value in parameters_of(model).items() if value.ndim > 1}
    sizes = {path: jnp.abs(value) for path, value in kernels.items()}
    return as_pruned(with_masks(model, {p: s >= jnp.quantile(s, 1 - kept) for p, s in sizes.items()})).model


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median, after one run that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return median(times[1:])


def row_of(name: str, model: nnx.Module, folder: Path, rounds: int) -> dict[str, Any]:
    """One network, packed and read."""
    file = folder / f"{name}.uapk"
    size = ua.pack(file, model)
    data, weights = file.read_bytes(), sum(value.size for value in parameters_of(model).values())
    decode = seconds(lambda: list(container.parse(data).arrays().values()), rounds)
    load = seconds(lambda: nnx.state(ua.load(file)), rounds)
    return {
        "name": name,
        "weights": weights,
        "file_bytes": size,
        "decode_seconds": decode,
        "weights_per_second": weights / decode,
        "load_seconds": load,
    }


def main(
    rounds: Annotated[int, typer.Option(help="Runs of each that are counted.")] = 5,
    quick: Annotated[bool, typer.Option(help="A small network, to see that it runs.")] = False,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
) -> None:
    """Time both."""
    start, network = time.perf_counter(), "digits" if quick else "vgg16"
    model = zoo.create(network)
    with tempfile.TemporaryDirectory() as folder:
        made = {"pruned to a tenth": pruned(model, 0.1), "as it is": model}
        rows = [{"network": network, **row_of(name, each, Path(folder), rounds)} for name, each in made.items()]
    checks = {
        "weights_per_second": check(rows[0]["weights_per_second"], ">=", 20e6),
        **{f"load_seconds, {row['name']}": check(row["load_seconds"], "<", 5.0) for row in rows},
    }
    command = f"python experiments/bench_packed.py --rounds {rounds}" + (" --quick" if quick else "")
    write_results(json_file, command, rows, checks, seconds=time.perf_counter() - start, seed=0, quick=quick)
    print(json.dumps({"rows": rows, "checks": checks}, indent=1))


if __name__ == "__main__":
    typer.run(main)
