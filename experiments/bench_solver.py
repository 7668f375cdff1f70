"""The layer solvers, measured: optimality, errors of every form at equal cost, speed.

    python experiments/bench_solver.py [--part convex,relu,forms,race,speed | all] --data DIR --models DIR [--quick]

Each part's rows are kept in the work folder as they come, so that a killed run resumes.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_solver_admm import convex_optimality, m_step_race, relu_optimality
from bench_solver_forms import FRACTIONS, form_rows, real_layers
from bench_solver_speed import default_solver_race
from resumable import Rows, kept

from unified_approx.results import check, write_results

RESULT = Path(__file__).parent / "results" / "bench_solver.json"
RACES = ((64, 576), (256, 2304), (512, 4608))


def form_table(work: Path, data: Path | None, models: Path, images: int, seed: int) -> Rows:
    """Part "forms", one file per layer and fraction."""
    rows: Rows = []
    for layer in real_layers(data, models, images, seed):
        for fraction in FRACTIONS:
            name = f"forms-{layer[0].replace('/', '_').replace(' ', '-')}-{fraction:g}"
            rows += kept(work, name, lambda layer=layer, fraction=fraction: form_rows(layer, fraction))
            shown = [r for r in rows if r["layer"] == layer[0] and r["fraction"] == fraction]
            print(layer[0], fraction, {r["form"]: round(r["error"], 4) for r in shown})
    return rows


def checks_of(rows: Rows) -> dict[str, Any]:
    """The targets that these rows can decide."""
    found: dict[str, Any] = {}
    part = {name: [r for r in rows if r["part"] == name] for name in ("convex", "relu", "forms", "race", "speed")}
    if part["convex"]:
        found["convex_gap"] = check(max(abs(r["gap"]) for r in part["convex"]), "<=", 1e-4)
    if part["relu"]:
        found["relu_gap"] = check(max(r["gap"] for r in part["relu"]), "<=", 1e-2)
    found |= _form_checks(part["forms"])
    for row in part["race"]:
        if row["method"] == "mm":
            found |= _race_checks(row, [r for r in part["race"] if r["p"] == row["p"] and r is not row])
    for row in part["speed"]:
        name = f"{row['n']}x{row['p']}"
        found[f"{name}_default_time_share"] = check(row["time_share"], "<=", 0.2)
        found[f"{name}_default_error_ratio"] = check(row["error_ratio"], "<", 1.0)
        if row["p"] == 4608:
            found[f"{name}_default_seconds"] = check(row["default_seconds"], "<", 90)
    return found


def _form_checks(rows: Rows) -> dict[str, Any]:
    """The figures of the two families on the reference layer, and that the final choice never loses to a pure form."""
    if not rows:
        return {}
    by = {(r["layer"], r["fraction"], r["form"]): r for r in rows}
    pure = [f for f in ("columns", "low_rank", "spatial") if any(k[2] == f for k in by)]
    losses = [
        row["held_out"] / by[(layer, fraction, form)]["held_out"]
        for (layer, fraction, name), row in by.items()
        if name == "final"
        for form in pure
        if (layer, fraction, form) in by
    ]
    reference = "resnet20 blocks/7/conv1"
    return {
        "final_against_pure_forms": check(max(losses), "<=", 1.0),
        "two_level_linear_50": check(by[(reference, 0.5, "two_level")]["linear_selected"], "<=", 0.0489),
        "spatial_linear_50": check(by[(reference, 0.5, "spatial")]["linear_selected"], "<=", 0.0364),
        "two_level_relu_50": check(by[(reference, 0.5, "two_level")]["error"], "<=", 0.0935),
        "spatial_relu_50": check(by[(reference, 0.5, "spatial")]["error"], "<=", 0.0709),
    }


def _race_checks(row: dict[str, Any], rivals: Rows) -> dict[str, Any]:
    name = f"{row['n']}x{row['p']}"
    times = [r["seconds_to_one_percent"] for r in rivals if r["seconds_to_one_percent"] is not None]
    own = row["seconds_to_one_percent"]
    best = min(times, default=float("inf"))
    return {
        f"{name}_mm_time_over_best_sgd": check(float("inf") if own is None else own / best, "<=", 1.0),
        f"{name}_mm_gap": check(row["primal_gap"], "<=", 1e-3),
        f"{name}_mm_share_of_matmul": check(row["step_gflops"] / row["matmul_gflops"], ">=", 0.6),
    }


def main(
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    part: str = "all",
    seed: int = 0,
    quick: bool = False,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
    work_dir: Annotated[Path, typer.Option(help="Finished rows are kept here.")] = Path(".bench_solver"),
    seconds_cap: Annotated[float, typer.Option(help="Of each side of a race, at each size.")] = 1200.0,
) -> None:
    """Make the tables."""
    start = time.perf_counter()
    work = work_dir / ("quick" if quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    wanted = set(part.split(","))
    if not wanted.isdisjoint({"convex", "all"}):
        rows += kept(work, "convex", lambda: convex_optimality(3 if quick else 30, seed))
    if not wanted.isdisjoint({"relu", "all"}):
        rows += kept(work, "relu", lambda: relu_optimality(2 if quick else 10, seed))
    if not wanted.isdisjoint({"forms", "all"}):
        rows += form_table(work, data, models, 300 if quick else 2000, seed)
    for n, p in RACES[: 1 if quick else None]:
        d, cap = 4 * p, 20.0 if quick else seconds_cap
        if not wanted.isdisjoint({"race", "all"}):
            rows += kept(work, f"race-{p}", lambda n=n, p=p, d=d, cap=cap: m_step_race(n, p, d, seed, cap))
        if not wanted.isdisjoint({"speed", "all"}):
            rows += kept(work, f"speed-{p}", lambda n=n, p=p, d=d: [default_solver_race(n, p, d, seed)])
    checks = checks_of(rows)
    command = f"python experiments/bench_solver.py --part {part} --seconds-cap {seconds_cap:g}"
    command += " --quick" if quick else ""
    write_results(json_file, command, rows, checks, seconds=time.perf_counter() - start, seed=seed, quick=quick)
    print(json.dumps(checks, indent=1))


if __name__ == "__main__":
    typer.run(main)
