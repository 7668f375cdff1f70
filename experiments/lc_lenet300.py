"""The published LC table of LeNet-300-100 on MNIST, with the network it was made with, and two rows that it lacks.

    python experiments/lc_lenet300.py --data DIR --models DIR [--row NAME ...] [--seeds 3] [--quick]

Published errors are from the examples of LC-model-compression, whose recipe this is: 40 values of mu, Nesterov's SGD
with a learning rate of each row's own times 0.98^step, batches of 256, errors of selected ranks as they are. Our own
choice is the length of the L steps: 7 epochs (14 at first) where the published ones have 20 (40 at first), because all
rows with 3 seeds must end within 3 hours. The network that is judged is the one of lowest training loss.
`sparse_low_rank` and `low_rank` store the same number of values. A killed run resumes.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import numpy as np
import published
import typer
from flax import nnx
from resumable import Rows, kept

from unified_approx import datasets, evaluate, zoo
from unified_approx.learning_compression import (
    LcResult,
    MuSchedule,
    Schedule,
    SgdLStep,
    exponential,
    informed,
    lc,
    parse_tasks,
)
from unified_approx.learning_compression.report import reported
from unified_approx.results import check, network_row, write_results

RESULT = Path(__file__).parent / "results" / "lc_lenet300.json"
WORK = Path(".lc_lenet300")
QUICK_STEPS, QUICK_EXAMPLES = 2, 2000
LONGEST = 10800
"""Seconds that all rows may take together."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        tasks: in the language of `unified-approx lc --tasks`.
        mu: first value.
        factor: from value to value.
        learning_rate: of the first L step.
        published: error in percent; None: not in the table.
    """

    tasks: str
    mu: float
    factor: float
    learning_rate: float
    published: float | None = None

    def schedule(self, steps: int) -> MuSchedule:
        """Of mu."""
        return exponential(self.mu, self.factor, steps)

    @property
    def digest(self) -> str:
        """Names files, so that what another recipe left behind is never taken for this one's."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]


CASES = {
    "quantize_all": Case("fc.=quantize(2)", 9e-5, 1.1, 0.09, 2.56),
    "quantize_two": Case("fc1=quantize(2),fc3=quantize(2)", 9e-5, 1.1, 0.09, 2.26),
    "prune": Case("fc.=joint(prune(0.05))", 9e-5, 1.1, 0.1, 2.18),
    "additive": Case("fc.=joint(prune(0.01)+quantize(2))", 9e-5, 1.1, 0.09, 2.17),
    "mixed": Case("fc1=prune(5000),fc2=low_rank(10),fc3=quantize(2)", 9e-5, 1.4, 0.05, 2.13),
    "rank_selection": Case("fc.=select_rank(1e-6)", 1e-3, 1.1, 0.1, 1.90),
    "sparse_low_rank": Case("fc1=low_rank(8)+prune_groups(64),fc2=low_rank(7)+prune_groups(12)", 1e-3, 1.3, 0.05),
    "low_rank": Case("fc1=low_rank(25),fc2=low_rank(10)", 1e-3, 1.3, 0.05),
}


@dataclass(frozen=True)
class Data:
    """The network and its images, as it takes them."""

    model: nnx.Module
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @classmethod
    def load(cls, data: Path | None, models: Path, examples: int | None) -> "Data":
        """All training images, or the first ones."""
        entry, mnist = zoo.entry("lenet300"), datasets.load("mnist", data)
        x, x_test = entry.preprocess(mnist.x_train[:examples], mnist), entry.preprocess(mnist.x_test, mnist)
        return cls(published.load("lenet300", models), x, mnist.y_train[:examples], x_test, mnist.y_test)

    def error(self, model: nnx.Module) -> float:
        """On the test images, in percent."""
        return 100.0 - evaluate.accuracy(model, self.x_test, self.y_test)


def schedule_of(case: Case, seed: int, quick: bool) -> Schedule:
    """The published L steps, but shorter."""
    first, epochs = (1, 1) if quick else (14, 7)
    rate = case.learning_rate
    return Schedule(epochs=epochs, first_epochs=first, batch_size=256, learning_rate=rate, decay=0.98, seed=seed)


def row_of(name: str, case: Case, data: Data, work: Path, seed: int, quick: bool) -> dict[str, Any]:
    """One compressed network, measured."""
    clock, l_step = time.perf_counter(), SgdLStep(data.x, data.y, schedule_of(case, seed, quick))
    tasks = informed(parse_tasks(case.tasks), data.model, data.x[:2])
    mus, stem = case.schedule(QUICK_STEPS if quick else 40), f"{name}-{seed}-{case.digest}"
    result = lc(data.model, tasks, l_step, mus, checkpoint_dir=work / stem)
    # A resumed run has spent more than this process saw.
    seconds = max(time.perf_counter() - clock, sum(sum(line.seconds) for line in result.history))
    found = measured(name, case, data, result, work / f"{stem}.safetensors")
    return {**found, "learning_rate": case.learning_rate, "seed": seed, "seconds": seconds}


def measured(name: str, case: Case, data: Data, result: LcResult, file: Path) -> dict[str, Any]:
    """Error, size by formula and on disk, and what the algorithm says of itself."""
    done = reported(data.model, result, data.x_test[:64], case.tasks)
    error, reference = data.error(result.model), data.error(data.model)
    report = done.report
    return network_row(
        network="lenet300",
        method="lc",
        name=name,
        budget=case.tasks,
        reference_accuracy=100 - reference,
        accuracy=100 - error,
        params_ratio=report.original_params / report.params,
        cr=result.cr,
        macs_ratio=report.original_macs / report.macs,
        error=error,
        reference_error=reference,
        published_error=case.published,
        bits=result.bits,
        file_bytes=result.save(file),
        best_step=result.best,
        info=[dict(info) for info in result.history[result.best].info],
        warnings=list(result.warnings),
        history=[asdict(line) for line in result.history],
    )


def summary(rows: Rows) -> Rows:
    """Mean and spread over the seeds, row by row."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        errors = [row["error"] for row in own]
        spread = stdev(errors) if len(errors) > 1 else 0.0
        mean = {field: fmean(row[field] for row in own) for field in ("cr", "bits", "file_bytes", "seconds")}
        line = {"part": "summary", "name": name, "error": fmean(errors), "std": spread, "seeds": len(own), **mean}
        lines.append({**line, "published_error": own[0]["published_error"], "budget": own[0]["budget"]})
    return lines


def checks_of(lines: Rows) -> dict[str, Any]:
    """The mean error is at most the published one, and all rows took no longer than they may."""
    known = [line for line in lines if line["published_error"] is not None]
    errors = {line["name"]: check(line["error"], "<=", line["published_error"]) for line in known}
    return {**errors, "seconds": check(seconds_of(lines), "<=", LONGEST)}


def seconds_of(lines: Rows) -> float:
    """Of all rows, whichever run made them."""
    return sum(line["seeds"] * line["seconds"] for line in lines)


def main(
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    row: Annotated[list[str] | None, typer.Option(help="Rows to make; others are taken if they are there.")] = None,
    seeds: int = 3,
    quick: bool = False,
    work_dir: Annotated[Path, typer.Option(help="Finished rows and checkpoints.")] = WORK,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
) -> None:
    """Make the table."""
    wanted = row or list(CASES)
    unknown = set(wanted) - set(CASES)
    if unknown:
        raise typer.BadParameter(f"--row: {', '.join(sorted(unknown))} unknown; there are {', '.join(CASES)}")
    work = work_dir / ("quick" if quick else "full")
    found, rows = Data.load(data, models, QUICK_EXAMPLES if quick else None), []
    for seed in range(seeds):
        for name, case in CASES.items():
            stem = f"row-{name}-{seed}-{case.digest}"
            if name in wanted or (work / f"{stem}.json").exists():
                rows += kept(
                    work, stem, lambda name=name, case=case, seed=seed: [row_of(name, case, found, work, seed, quick)]
                )
                print(
                    {
                        k: rows[-1][k]
                        for k in ("name", "seed", "error", "published_error", "cr", "file_bytes", "seconds")
                    }
                )
    lines = summary(rows)
    checks, seconds = checks_of(lines), seconds_of(lines)
    flags = f" --seeds {seeds}" + (" --quick" if quick else "")
    command = f"python experiments/lc_lenet300.py{flags}"
    write_results(json_file, command, rows + lines, checks, seconds=seconds, seed=0, quick=quick)
    print(json.dumps(checks, indent=1))


if __name__ == "__main__":
    typer.run(main)
