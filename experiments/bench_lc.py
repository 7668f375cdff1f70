"""The LC algorithm's steps, measured: L steps on LeNet-300-100, C steps on a million weights.

    python experiments/bench_lc.py [--part l_step,k_means,codebook,prune | all] --data DIR [--models DIR] [--quick]

- l_step: examples a second and GFLOP/s of our L step, beside the machine's matrix product of the same shapes;
- k_means: K = 4 on 10^6 weights, from scratch and from the codebook before, beside scikit-learn's `KMeans` with the
  arguments that LC-model-compression gives it (k-means++ from 10 starts, tolerance 1e-10; one start when warm);
- codebook: the optimal one, K = 4, 16;
- prune: 5 % of 10^6 weights, beside a NumPy sort;
- peer: both steps of LC-model-compression itself (`lc_peer.py`), with `--peer CHECKOUT` and a Python that has PyTorch
  and scikit-learn in `--peer-python`.
"""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import published
import typer

from solvers.compressions import AdaptiveCodebook, OptimalCodebook, PruneL0
from unified_approx import datasets, zoo
from unified_approx.learning_compression import Penalty, Schedule, SgdLStep, Task
from unified_approx.learning_compression.tasks import resolve
from unified_approx.pieces import parameters_of
from unified_approx.results import check, write_results

RESULT = Path(__file__).parent / "results" / "bench_lc.json"
BATCH = 256
TARGETS = {
    "l_step_share_of_matmul": (">=", 0.6),
    "k_means_speedup": (">=", 20.0),
    "k_means_warm_speedup": (">=", 20.0),
    "optimal_16_seconds": ("<=", 10.0),
    "l_step_speedup_over_peer": (">=", 2.0),
    "k_means_speedup_over_peer": (">=", 20.0),
}


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """The fastest of several runs after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_gflops(repeats: int) -> float:
    """Of the products of the largest layer in one update: forward, and the gradient of its kernel."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((BATCH, 784), (784, 300)))

    @jax.jit
    def products(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 100, lambda _, w: w + 1e-9 * (x.T @ (x @ w)), w)

    return 100 * 4 * BATCH * 784 * 300 / seconds_of(lambda: products(x, w), repeats) / 1e9


def l_step(data: Path | None, models: Path, epochs: int) -> dict[str, Any]:
    """One L step, whole, as `lc` runs it."""
    entry, mnist = zoo.entry("lenet300"), datasets.load("mnist", data)
    model = published.load("lenet300", models)
    x = entry.preprocess(mnist.x_train, mnist)
    step = SgdLStep(x, np.asarray(mnist.y_train), Schedule(epochs=epochs, learning_rate=0.05))
    pieces = resolve([Task(path="fc.", compression=PruneL0(0.05), view="vector", joint=True)], model)
    targets = tuple(piece.compression.compress(piece.pack(parameters_of(model)), 0.0) for piece in pieces)
    penalty = Penalty(jnp.asarray(1e-3), targets, pieces)

    def run() -> Any:
        return parameters_of(step(model, penalty, 0))

    seconds, weights = seconds_of(run, 2), (784 * 300, 300 * 100, 100 * 10)
    updates = epochs * (len(x) // BATCH)
    # Forward and kernel gradients of all layers, input gradients of all but the first.
    flops = 2 * BATCH * (3 * sum(weights) - weights[0])
    product = matmul_gflops(5)
    return {
        "part": "l_step",
        "examples_per_second": updates * BATCH / seconds,
        "milliseconds_per_update": 1e3 * seconds / updates,
        "gflops": updates * flops / seconds / 1e9,
        "matmul_gflops": product,
        "share_of_matmul": updates * flops / seconds / 1e9 / product,
        "seconds_per_epoch": seconds / epochs,
    }


def k_means(count: int, repeats: int) -> dict[str, Any]:
    """Ours beside scikit-learn's, on the same weights; squared errors too."""
    from sklearn.cluster import KMeans

    values = np.random.default_rng(0).laplace(size=count).astype(np.float32)
    w, form = jnp.asarray(values), AdaptiveCodebook(4)
    compress = jax.jit(form.compress)
    theta = compress(w, 0.0)
    start = jax.tree.map(lambda a: a * 1.05 if a.ndim == 1 and a.size == 4 else a, theta)

    def error(centers: np.ndarray) -> float:
        return float(np.sum(np.min((values[:, None].astype(np.float64) - centers.reshape(1, -1)) ** 2, axis=1)))

    def theirs(**arguments: Any) -> tuple[float, np.ndarray]:
        clock = time.perf_counter()
        found = KMeans(n_clusters=4, tol=1e-10, **arguments).fit(values[:, None])
        return time.perf_counter() - clock, found.cluster_centers_

    cold, centers = theirs(init="k-means++", n_init=10, random_state=0)
    warm, _ = theirs(init=np.asarray(start.centers)[:, None], n_init=1)
    ours = seconds_of(lambda: compress(w, 0.0), repeats)
    ours_warm = seconds_of(lambda: compress(w, 0.0, start), repeats)
    return {
        "part": "k_means",
        "weights": count,
        "seconds": ours,
        "warm_seconds": ours_warm,
        "sklearn_seconds": cold,
        "sklearn_warm_seconds": warm,
        "speedup": cold / ours,
        "warm_speedup": warm / ours_warm,
        "error_ratio": error(np.asarray(theta.centers)) / error(centers),
    }


def codebook(count: int) -> dict[str, Any]:
    """The exact codebook."""
    values = jnp.asarray(np.random.default_rng(0).standard_t(3, size=count), jnp.float32)
    found = {"part": "codebook", "weights": count}
    for k in (4, 16):
        found[f"seconds_{k}"] = seconds_of(lambda k=k: OptimalCodebook(k).compress(values, 0.0), 1)
    return found


def prune(count: int, repeats: int) -> dict[str, Any]:
    """The largest 5 %."""
    values = np.random.default_rng(0).normal(size=count).astype(np.float32)
    w, compress = jnp.asarray(values), jax.jit(PruneL0(0.05).compress)
    clock = time.perf_counter()
    np.argsort(-np.abs(values), kind="stable")
    theirs = time.perf_counter() - clock
    return {"part": "prune", "weights": count, "seconds": seconds_of(lambda: compress(w, 0.0), repeats), "sort": theirs}


def peer(
    python: str, checkout: Path, data: Path | None, epochs: int, count: int, ours: dict[str, dict[str, Any]]
) -> Any:
    """The peer's steps, and how many times as fast ours are; it is given the number of threads that is best for it."""
    file = (data or Path()) / "mnist.npz"
    arguments = [str(checkout), str(file), str(epochs), str(count)]
    script = str(Path(__file__).with_name("lc_peer.py"))
    run = subprocess.run([python, script, *arguments], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    seconds = min(found["l_step"].values())
    row = {"part": "peer", "torch": found["torch"], "l_step_seconds_per_epoch": seconds, **found["c_step"]}
    if "l_step" in ours:
        row["l_step_speedup"] = seconds / ours["l_step"]["seconds_per_epoch"]
    if "k_means" in ours:
        row["k_means_speedup"] = found["c_step"]["cold"] / ours["k_means"]["seconds"]
        row["k_means_warm_speedup"] = found["c_step"]["warm"] / ours["k_means"]["warm_seconds"]
    return row


def checks_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The targets that these rows can decide."""
    part = {row["part"]: row for row in rows}
    fields = {
        "l_step_share_of_matmul": ("l_step", "share_of_matmul"),
        "k_means_speedup": ("k_means", "speedup"),
        "k_means_warm_speedup": ("k_means", "warm_speedup"),
        "optimal_16_seconds": ("codebook", "seconds_16"),
        "l_step_speedup_over_peer": ("peer", "l_step_speedup"),
        "k_means_speedup_over_peer": ("peer", "k_means_speedup"),
    }
    known = {name: (row, field) for name, (row, field) in fields.items() if field in part.get(row, {})}
    return {name: check(part[row][field], *TARGETS[name]) for name, (row, field) in known.items()}


def main(
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    part: str = "all",
    peer_checkout: Annotated[Path | None, typer.Option("--peer", help="Of LC-model-compression.")] = None,
    peer_python: Annotated[str, typer.Option(help="With PyTorch and scikit-learn.")] = "python3",
    quick: bool = False,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
) -> None:
    """Measure; nothing else should run on the machine."""
    start, wanted = time.perf_counter(), set(part.split(","))
    count, repeats = (10**5, 2) if quick else (10**6, 5)
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "l_step": lambda: l_step(data, models, 1 if quick else 10),
        "k_means": lambda: k_means(count, repeats),
        "codebook": lambda: codebook(count),
        "prune": lambda: prune(count, repeats),
    }
    rows = []
    for name, make in makers.items():
        if not wanted.isdisjoint({name, "all"}):
            rows.append(make())
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()})
    if peer_checkout is not None:
        ours = {row["part"]: row for row in rows}
        rows.append(peer(peer_python, peer_checkout, data, 1 if quick else 5, count, ours))
        print(rows[-1])
    checks = checks_of(rows)
    flags = (" --peer CHECKOUT" if peer_checkout else "") + (" --quick" if quick else "")
    command = f"python experiments/bench_lc.py --part {part}{flags}"
    write_results(json_file, command, rows, checks, seconds=time.perf_counter() - start, seed=0, quick=quick)
    print(json.dumps(checks, indent=1))


if __name__ == "__main__":
    typer.run(main)
