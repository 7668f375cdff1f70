"""Compression by a quadratic model of the loss, without data or training: error against size.

    python experiments/fast_lc.py [--network lenet300] --data DIR --models DIR [--quick]

    direct           pruning by size, k-means: knows nothing of the loss
    diagonal         fast LC with a diagonal model; pruning and codebooks at once, by their exact solutions
    diagonal_damped  the same with the mean curvature added to all curvatures
    kronecker        fast LC with a Kronecker-factored model of every kernel, by alternation
    lc               the Learning-Compression algorithm with training, from `results/lc_lenet300.json` if it is there

Pruning keeps a share of all weights of kernels together; quantization gives each layer a codebook of its own. Models
are made from training images; errors are those of the test set. `predicted` is the model's loss, `loss` the true one on
2,000 of these images, `reference_loss` that of the original there.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import published
import typer
from flax import nnx
from resumable import Rows, kept

from solvers.compressions import AdaptiveCodebook, PruneL0
from solvers.output_loss import Softmax
from unified_approx import datasets, evaluate, zoo
from unified_approx.learning_compression import (
    LcResult,
    NetworkTaylor,
    Task,
    direct_compression,
    fast_lc,
    load_taylor,
    taylor_of,
)
from unified_approx.learning_compression.fast import DAMPING
from unified_approx.pieces import parameters_of
from unified_approx.results import check, network_row, read_rows, write_results

RESULT = Path(__file__).parent / "results" / "fast_lc.json"
FULL_LC = Path(__file__).parent / "results" / "lc_lenet300.json"
FULL_LC_NAMES = {"prune": "prune=0.05", "quantize_all": "quantize=2"}
WORK = Path(".fast_lc")
DIRECT, DIAGONAL, DAMPED, KRONECKER, LC = "direct", "diagonal", "diagonal_damped", "kronecker", "lc"


@dataclass(frozen=True)
class Approach:
    """One way to compress without data.

    Attributes:
        structure: of the quadratic model; None: none.
        damping: of the model.
    """

    structure: str | None
    damping: float = DAMPING


APPROACHES = {
    DIRECT: Approach(None),
    DIAGONAL: Approach("diagonal"),
    DAMPED: Approach("diagonal", 1.0),
    KRONECKER: Approach("kronecker"),
}


@dataclass(frozen=True)
class Case:
    """What is done with one network.

    Attributes:
        kernels: pattern of what is compressed.
        prune: shares of the weights that stay.
        quantize: sizes of the codebooks.
        approaches: names in `APPROACHES`.
        curvature: of the quadratic models.
        examples: training images that they are made from.
        test: test images; None: all.
    """

    kernels: str
    prune: tuple[float, ...]
    quantize: tuple[int, ...]
    approaches: tuple[str, ...]
    curvature: str
    examples: int
    test: int | None = None


ALL = tuple(APPROACHES)
SHARES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02)
FULL = {
    "lenet300": Case("fc.", SHARES, (2, 4, 8, 16), ALL, "gauss_newton", 60_000),
    "resnet20": Case(".*conv.|fc", (0.3,), (8,), ALL, "gauss_newton", 2000),
    "vgg16": Case("convs/.*|fc", (0.2, 0.1, 0.05), (8, 4), ALL[:3], "monte_carlo", 2000),
}
QUICK = {
    "lenet300": Case("fc.", (0.1,), (2,), ALL, "gauss_newton", 2000, 2000),
    "resnet20": Case(".*conv.|fc", (0.3,), (), (DIRECT, KRONECKER), "gauss_newton", 128, 500),
    "vgg16": Case("convs/.*|fc", (0.2,), (8,), (DIRECT, DIAGONAL), "fisher", 32, 200),
}
BATCH = {"lenet300": 500, "resnet20": 64, "vgg16": 32}
SHOWN = ("network", "approach", "budget", "error", "loss", "predicted", "cr", "seconds")
BETWEEN = {DIRECT: "<=", LC: ">="}  # of errors
BOUNDS = {DIAGONAL: BETWEEN, DAMPED: BETWEEN, KRONECKER: {**BETWEEN, DIAGONAL: "<="}}
VGG_SECONDS = {"prune": 1.0, "quantize": 120.0}


@dataclass(frozen=True)
class Network:
    """A network and its images, as it takes them."""

    name: str
    model: nnx.Module
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def error(self, model: nnx.Module) -> float:
        """Of a network of this structure on the test images, in percent."""
        return 100.0 - evaluate.accuracy(model, self.x_test, self.y_test)

    def loss(self, model: nnx.Module, examples: int = 2000) -> float:
        """Mean cross entropy on training images."""
        x, y = self.x[:examples], self.y[:examples]
        return float(jnp.mean(Softmax().values(jnp.asarray(evaluate.predict(model, x)), jnp.asarray(y))))


def load(name: str, case: Case, data: Path | None, models: Path, seed: int) -> Network:
    """A random sample of the training images, and the first test images."""
    entry = zoo.entry(name)
    images = datasets.load(entry.dataset, data)
    chosen = np.random.default_rng(seed).permutation(len(images.x_train))[: case.examples]
    test = slice(case.test)
    prepared = (entry.preprocess(part, images) for part in (images.x_train[chosen], images.x_test[test]))
    x, x_test = prepared
    return Network(name, published.load(name, models), x, images.y_train[chosen], x_test, images.y_test[test])


def taylor(network: Network, case: Case, structure: str, work: Path, seed: int) -> tuple[NetworkTaylor, float]:
    """The quadratic model, and the seconds that it took; from the work folder if it is there."""
    stem = work / f"{network.name}-{structure}-{case.curvature}-{case.examples}-{seed}"
    file, clock = stem.with_suffix(".safetensors"), time.perf_counter()
    if not file.exists():
        options = {"curvature": case.curvature, "structure": structure, "batch_size": BATCH[network.name]}
        made = taylor_of(network.model, network.x, network.y, seed=seed, **options)
        seconds = time.perf_counter() - clock
        made.save(file)
        stem.with_suffix(".seconds").write_text(json.dumps(seconds))
    return load_taylor(file, network.model), float(json.loads(stem.with_suffix(".seconds").read_text()))


def tasks_of(case: Case, budget: str) -> list[Task]:
    """`prune=share` or `quantize=k`."""
    kind, size = budget.split("=")
    if kind == "quantize":
        return [Task(path=case.kernels, compression=AdaptiveCodebook(int(size)))]
    return [Task(path=case.kernels, compression=PruneL0(float(size)), view="vector", joint=True)]


def compress(
    network: Network, tasks: Sequence[Task], model: NetworkTaylor | None, damping: float
) -> tuple[LcResult, float]:
    """Directly or by a model, and the seconds; a second run's, when everything is compiled."""

    def run() -> LcResult:
        if model is None:
            return direct_compression(network.model, tasks)
        return fast_lc(network.model, tasks, model, damping=damping)

    run()
    clock = time.perf_counter()
    result = run()
    return result, time.perf_counter() - clock


def row_of(
    network: Network, case: Case, budget: str, approach: str, model: NetworkTaylor | None, **more: Any
) -> dict[str, Any]:
    """One compressed network, measured."""
    damping = APPROACHES[approach].damping
    result, seconds = compress(network, tasks_of(case, budget), model, damping)
    error, reference = network.error(result.model), network.error(network.model)
    own, original = parameters_of(result.model), parameters_of(network.model)
    values = sum(int(jnp.sum(value != 0)) for value in own.values())
    return network_row(
        network=network.name,
        method="direct" if model is None else "fast_lc",
        approach=approach,
        damping=None if model is None else damping,
        budget=budget,
        reference_accuracy=100 - reference,
        accuracy=100 - error,
        params_ratio=sum(value.size for value in original.values()) / values,
        cr=result.cr,
        macs_ratio=None,
        error=error,
        reference_error=reference,
        loss=network.loss(result.model),
        reference_loss=network.loss(network.model),
        predicted=None if model is None else result.history[-1].loss,
        seconds=seconds,
        **more,
    )


def measure(name: str, case: Case, data: Path | None, models: Path, work: Path, seed: int) -> Rows:
    """All rows of a network; those in the work folder are not made again."""
    done = work / f"all-{name}-{seed}.json"
    if done.exists():
        return json.loads(done.read_text())
    network, rows = load(name, case, data, models, seed), []
    budgets = [f"prune={share:g}" for share in case.prune] + [f"quantize={k}" for k in case.quantize]
    for approach in case.approaches:
        structure = APPROACHES[approach].structure
        model, seconds = (None, 0.0) if structure is None else taylor(network, case, structure, work, seed)
        origin = {"curvature": None if model is None else case.curvature, "model_seconds": seconds}
        for budget in budgets:
            make = partial(row_of, network, case, budget, approach, model, **origin)
            rows += kept(work, f"{name}-{approach}-{budget}-{seed}", lambda make=make: [make()])
            print({field: rows[-1][field] for field in SHOWN})
    return kept(work, f"all-{name}-{seed}", lambda: rows)


def full_lc(file: Path) -> Rows:
    """The rows of the algorithm with training that have a counterpart here."""
    if not file.exists():
        return []
    rows = [row for row in read_rows(file) if row.get("name") in FULL_LC_NAMES]
    own = {"method": "lc", "network": "lenet300", "approach": LC}
    return [{**row, **own, "budget": FULL_LC_NAMES[row["name"]]} for row in rows]


def checks_of(rows: Rows) -> dict[str, Any]:
    """Fast LC lies between direct compression and LC, the Kronecker model pays, and large networks take little time."""
    errors = {(r["network"], r["budget"], r["approach"]): r["error"] for r in rows}
    found = {}
    for (network, budget, approach), error in errors.items():
        for other, relation in BOUNDS.get(approach, {}).items():
            if (network, budget, other) in errors:
                target = errors[network, budget, other]
                found[f"{network}_{budget}_{approach}_against_{other}"] = check(error, relation, target)
    for row in rows:
        if row["network"] == "vgg16" and row["approach"] == DIAGONAL:
            limit = VGG_SECONDS[row["budget"].split("=")[0]]
            found[f"vgg16_{row['budget']}_seconds"] = check(row["seconds"], "<=", limit)
    return found


def run(
    networks: Sequence[str],
    *,
    data: Path | None,
    models: Path,
    work_dir: Path = WORK,
    json_file: Path = RESULT,
    quick: bool = False,
    seed: int = 0,
) -> Rows:
    """Measure and write the result file; arguments as on the command line."""
    start, cases = time.perf_counter(), QUICK if quick else FULL
    work = work_dir / ("quick" if quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    rows = [row for name in networks for row in measure(name, cases[name], data, models, work, seed)]
    rows += full_lc(FULL_LC) if "lenet300" in networks else []
    command = "python experiments/fast_lc.py" + (" --quick" if quick else "")
    write_results(
        json_file, command, rows, checks_of(rows), seconds=time.perf_counter() - start, seed=seed, quick=quick
    )
    return rows


def main(
    network: Annotated[str, typer.Option(help="lenet300, resnet20, vgg16, or all")] = "all",
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = Path("models"),
    seed: int = 0,
    quick: bool = False,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
    work_dir: Annotated[Path, typer.Option(help="Finished rows are kept here; a killed run resumes.")] = WORK,
) -> None:
    """Measure, and write the table."""
    names = tuple(FULL) if network == "all" else (network,)
    where = {"data": data, "models": models, "work_dir": work_dir, "json_file": json_file}
    print(json.dumps(checks_of(run(names, **where, quick=quick, seed=seed)), indent=1))


if __name__ == "__main__":
    typer.run(main)
