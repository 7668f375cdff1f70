"""EVBMF of VGG-16's unfoldings: ours beside that of musco-pytorch, times and ranks.

    python experiments/bench_vbmf.py --peer musco-pytorch/musco/pytorch/compressor/rank_selection/vbmf.py --models DIR

The peer's file is the reader's own copy of github musco-ai/musco-pytorch; without it only ours is timed. Both get the
unfoldings of output and input channels of every 3x3 convolution with at least 64 inputs, in turn; medians of rounds.
Ranks differ where the peer's search for the noise ends in a local minimum; so they are compared at its noise too.
"""

import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import published
import typer
from jaxtyping import Float

from solvers.vbmf import evbmf
from unified_approx.pieces import parameters_of
from unified_approx.results import check, write_results
from unified_approx.sites import path_name

RESULT = Path(__file__).parent / "results" / "bench_vbmf.json"
Matrix = Float[np.ndarray, "rows columns"]


def unfoldings(models: Path) -> dict[str, Matrix]:
    """Rows no more than columns, as both want them."""
    found = {}
    for path, kernel in parameters_of(published.load("vgg16", models)).items():
        if kernel.ndim == 4 and kernel.shape[2] >= 64:
            values = np.asarray(kernel, np.float32)
            found[f"{path_name(path[:-1])}, outputs"] = values.reshape(-1, values.shape[3]).T.copy()
            inputs = np.moveaxis(values, 2, 0)
            found[f"{path_name(path[:-1])}, inputs"] = inputs.reshape(values.shape[2], -1).copy()
    return found


def peer_of(file: Path) -> Callable[[Matrix], tuple[int, float]]:
    """The rank and the noise that the other implementation finds."""
    spec = importlib.util.spec_from_file_location("peer_vbmf", file)
    if spec is None or spec.loader is None:
        raise typer.BadParameter(f"--peer: {file} is no Python file; give vbmf.py of musco-pytorch")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(matrix: Matrix) -> tuple[int, float]:
        found = module.EVBMF(matrix)
        return int(found[1].shape[0]), float(found[-1]["sigma2"])

    return run


def ours(matrix: Matrix) -> tuple[int, float]:
    """The rank and the noise."""
    found = evbmf(matrix)
    return found.rank, found.noise


def timed(run: Callable[[Matrix], tuple[int, float]], matrix: Matrix) -> tuple[float, int, float]:
    """Seconds, rank and noise."""
    start = time.perf_counter()
    found = run(matrix)
    return time.perf_counter() - start, *found


def compared(matrix: Matrix, noise: float) -> dict[str, Any]:
    """What ours finds at the peer's noise, and how much lower the free energy is at its own, in nats."""
    there = evbmf(matrix, noise)
    return {"rank_at_peer_noise": there.rank, "free_energy_gain": there.free_energy - evbmf(matrix).free_energy}


def main(
    peer: Annotated[Path | None, typer.Option(help="vbmf.py of musco-pytorch.")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    rounds: int = 3,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
) -> None:
    """Time all of them."""
    start, rows = time.perf_counter(), list[dict[str, Any]]()
    forms: dict[str, Callable[[Matrix], tuple[int, float]]] = {"ours": ours}
    if peer is not None:
        forms["peer"] = peer_of(peer)
    for name, matrix in unfoldings(models).items():
        seen = [{form: timed(run, matrix) for form, run in forms.items()} for _ in range(rounds)]
        row: dict[str, Any] = {"name": name, "shape": list(matrix.shape)}
        for form in forms:
            row |= {f"{form}_seconds": median(s[form][0] for s in seen), f"{form}_rank": seen[0][form][1]}
        if peer is not None:
            row |= compared(matrix, seen[0]["peer"][2])
        rows.append(row)
        print(row, flush=True)
    totals = {form: sum(row[f"{form}_seconds"] for row in rows) for form in forms}
    rows.append({"name": "all", **{f"{form}_seconds": total for form, total in totals.items()}})
    checks = {}
    if peer is not None:
        ranks = [abs(row["rank_at_peer_noise"] - row["peer_rank"]) for row in rows[:-1]]
        checks["times as fast"] = check(totals["peer"] / totals["ours"], ">=", 10.0)
        checks["largest difference of ranks at the same noise"] = check(max(ranks), "<=", 1)
        gain = min(row["free_energy_gain"] for row in rows[:-1])
        checks["least gain in free energy, nats"] = check(gain, ">=", -1e-6)
    command = "python experiments/bench_vbmf.py" + (" --peer vbmf.py" if peer else "")
    write_results(json_file, command, rows, checks, seconds=time.perf_counter() - start, seed=0)
    print(json.dumps(checks, indent=1))


if __name__ == "__main__":
    typer.run(main)
