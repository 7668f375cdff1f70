"""CIFAR ResNets compressed in one shot: no labels, no fine-tuning, every convolution but the first.

    python experiments/resnet_one_shot.py --data DIR --models DIR [--quick]

For each network, budget and seed: 2,000 training images calibrate, the full test set measures reference and compressed
network in the same run. The first run's file is loaded in a new process, which must find the same accuracy.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import published
import typer

import unified_approx as ua
from unified_approx import datasets, evaluate, zoo
from unified_approx.files import replacing
from unified_approx.memory import compact
from unified_approx.results import check, network_row, peak_rss_mb, write_results

KEEP = (ua.Rule(path="conv1", keep=True), ua.Rule(path="fc", keep=True))
RESULT = Path(__file__).parent / "results" / "resnet_one_shot.json"


@dataclass(frozen=True)
class Target:
    """One line of the table: accuracy to reach at a fraction of the convolutions' parameters."""

    network: str
    ratio: float
    accuracy: float

    @property
    def name(self) -> str:
        """Name of the check."""
        return f"{self.network}_{self.ratio:g}x_accuracy"


TARGETS = (Target("resnet20", 1.5, 91.3), Target("resnet20", 2.0, 90.6), Target("resnet56", 2.0, 92.0))


def calibration_images(images: np.ndarray, count: int, seed: int) -> np.ndarray:
    """A random sample of the training images; each seed has its own."""
    return images[np.random.default_rng(seed).choice(len(images), count, replace=False)]


def one_run(target: Target, models: Path, data_dir: Path | None, seed: int, count: int, file: Path) -> dict[str, Any]:
    """Compress once; what was measured."""
    entry, data = zoo.entry(target.network), datasets.load("cifar10", data_dir)
    model = published.load(target.network, models)
    images = entry.preprocess(calibration_images(data.x_train, count, seed))
    raw, labels = data.x_test, data.y_test
    del data  # the training images that were not drawn are no part of what a run needs
    start = time.perf_counter()
    rules = (*KEEP, ua.Rule(path=".*", budget=ua.Budget(params=1 / target.ratio)))
    result = ua.compress(model, images, rules=rules, seed=seed)
    seconds = time.perf_counter() - start
    test = entry.preprocess(raw)
    file_bytes = result.save(file)
    reference, logits = (evaluate.predict(m, test) for m in (model, result.model))
    correct = [float(100 * np.mean(np.argmax(z, axis=1) == labels)) for z in (reference, logits)]
    chosen = [row for row in result.report.layers if row.status == "compressed"]
    return {
        "seed": seed,
        "reference_accuracy": correct[0],
        "accuracy": correct[1],
        "seconds": seconds,
        "peak_rss_mb": peak_rss_mb(),
        "convolution_params_ratio": sum(r.original_params for r in chosen) / sum(r.params for r in chosen),
        "params_ratio": result.report.params_ratio,
        "cr": result.report.cr,
        "macs_ratio": result.report.macs_ratio,
        "file_bytes": file_bytes,
        "bytes_ratio": original_bytes(model) / file_bytes,
        "budget_met": bool(result.budget_met),
        "forms": {row.name: row.form for row in chosen},
        "candidates": {row.name: row.candidates for row in chosen},
    }


def original_bytes(model: Any) -> int:
    """Size of the original, saved the same way."""
    with tempfile.TemporaryDirectory() as folder:
        return ua.save(Path(folder) / "original.safetensors", model)


def accuracy_in_new_process(file: Path, data_dir: Path | None) -> float:
    """What `unified-approx evaluate` finds for the file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        where = ["--data", str(data_dir)] if data_dir is not None else []
        command = [sys.executable, "-m", "unified_approx.cli", "evaluate", str(file), *where, "--json", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return float(json.loads(out.read_text())["accuracy"])


def summary(target: Target, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one target: means over the seeds."""

    def mean(name: str) -> float:
        return statistics.fmean(run[name] for run in runs)

    return network_row(
        network=target.network,
        method="admm",
        budget=f"params={1 / target.ratio:.4g}",
        reference_accuracy=mean("reference_accuracy"),
        accuracy=mean("accuracy"),
        params_ratio=mean("params_ratio"),
        cr=mean("cr"),
        macs_ratio=mean("macs_ratio"),
        bytes_ratio=mean("bytes_ratio"),
        file_bytes=round(mean("file_bytes")),
        std=statistics.stdev([run["accuracy"] for run in runs]) if len(runs) > 1 else 0.0,
        seeds=len(runs),
        convolution_params_ratio=mean("convolution_params_ratio"),
        seconds=mean("seconds"),
        peak_rss_mb=max(run["peak_rss_mb"] for run in runs),
        runs=runs,
    )


def in_own_process(
    target: Target, models: Path, data_dir: Path | None, seed: int, count: int, work: Path
) -> dict[str, Any]:
    """One run in a process of its own, so that its memory and compilations are its own; reused if already done."""
    done = work / f"{target.network}-{target.ratio:g}-{count}-{seed}.json"
    if not done.exists():
        where = ["--data", str(data_dir)] if data_dir is not None else []
        arguments = ["--one", target.name, "--seed", str(seed), "--count", str(count), "--work-dir", str(work)]
        command = [sys.executable, __file__, "--models", str(models), *where, *arguments]
        subprocess.run(command, check=True)
    return json.loads(done.read_text())


def write_one(target: Target, models: Path, data_dir: Path | None, seed: int, count: int, work: Path) -> None:
    """The body of `in_own_process`."""
    stem = f"{target.network}-{target.ratio:g}-{count}-{seed}"
    run = one_run(target, models, data_dir, seed, count, work / f"{stem}.safetensors")
    with replacing(work / f"{stem}.json") as partial:
        partial.write_text(json.dumps(run))


def checks_of(rows: list[dict[str, Any]], reloaded: float) -> dict[str, Any]:
    """Every target against its row, the run's limits, and the file's accuracy."""
    found: dict[str, Any] = {}
    for target, row in zip(TARGETS, rows, strict=True):
        found[target.name] = check(row["accuracy"], ">=", target.accuracy)
        size = f"{target.network}_{target.ratio:g}x_convolution_params_ratio"
        found[size] = check(row["convolution_params_ratio"], ">=", target.ratio)
    slowest = max(run["seconds"] for row in rows if row["network"] == "resnet20" for run in row["runs"])
    peak = max(run["peak_rss_mb"] for row in rows if row["network"] == "resnet20" for run in row["runs"])
    found["resnet20_seconds"] = check(slowest, "<=", 180)
    found["resnet20_peak_rss_mb"] = check(peak, "<=", 3000)
    found["resnet20_2x_reloaded_accuracy"] = check(reloaded, "==", rows[1]["runs"][0]["accuracy"])
    return found


def main(
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    seed: int = 0,
    seeds: int = 3,
    quick: bool = False,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
    work_dir: Annotated[Path, typer.Option(help="Finished runs are kept here; a killed table resumes.")] = Path(
        ".resnet_one_shot"
    ),
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
    count: Annotated[int, typer.Option(hidden=True)] = 2000,
) -> None:
    """Make the table."""
    start = time.perf_counter()
    work_dir.mkdir(parents=True, exist_ok=True)
    if one is not None:
        target = next(t for t in TARGETS if t.name == one)
        with compact():
            write_one(target, models, data, seed, count, work_dir)
        return
    count, seeds = (300, 1) if quick else (count, seeds)
    rows = []
    for target in TARGETS:
        runs = [in_own_process(target, models, data, seed + i, count, work_dir) for i in range(seeds)]
        rows.append(summary(target, runs))
        shown = {k: rows[-1][k] for k in ("network", "budget", "accuracy", "std", "params_ratio", "seconds")}
        print(json.dumps(shown))
    file = work_dir / f"resnet20-2-{count}-{seed}.safetensors"
    checks = checks_of(rows, accuracy_in_new_process(file, data))
    command = "python experiments/resnet_one_shot.py" + (" --quick" if quick else "")
    write_results(json_file, command, rows, checks, seconds=time.perf_counter() - start, seed=seed, quick=quick)
    print(json.dumps(checks, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    typer.run(main)
