"""The demo: a small network made smaller on this machine, with the numbers and pictures to believe it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32
from rich.console import Console
from rich.table import Table

from solvers.admm import solve
from solvers.admm_state import AdmmOptions, AdmmSolution, Status
from solvers.layer import LayerOptions
from solvers.m_step import MajorizeMinimize, MStep
from solvers.penalties import Penalized, lambda_max, split_band
from solvers.reconstruction import LayerProblem, relative_error
from solvers.sgd import Sgd
from unified_approx import comparison, datasets, pipeline, plots, zoo
from unified_approx.assemble import get
from unified_approx.budget import Budget
from unified_approx.capture import Capture
from unified_approx.evaluate import accuracy
from unified_approx.im2col import kernel_to_matrix
from unified_approx.report import ProgressEvent
from unified_approx.results import check, write_results
from unified_approx.rules import Rule
from unified_approx.sampling import problems
from unified_approx.storage import load

NETWORK = "digits"
FILE_NAME = "digits-compressed.safetensors"
M_STEPS: dict[str, MStep] = {"mm": MajorizeMinimize(), "sgd": Sgd()}
TITLES = {"mm": "majorise-minimise", "sgd": "SGD (Optax)"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is done.

    Attributes:
        layer: the layer that the two M steps are compared on.
        lambda_sparse: its penalty, a fraction of its maximum.
        band: where in the band in which both parts can be non-zero the other penalty lies: 0 lower end, 1 upper end,
            on a logarithmic scale.
        max_steps: of that solve.
        images: calibration images.
        rows: sampled positions per layer.
        budget: fraction of the network's parameters that remains in the main run.
        budgets: the other budgets in the picture of accuracy against parameters.
        penalties: fractions of the maxima for the paper's method in the same picture.
        rounds: timed runs of each network.
        seed: of images and positions.
        keep: layers that stay as they are, as is usual for the first and the last.
        options: of the layer solver. One form, because trying all of them compiles for longer than a demo may take.
        last_start: seconds after the start of the demo after which no further point of that picture is begun (one point
            of each curve there always is).
    """

    layer: str = "conv2"
    lambda_sparse: float = 0.003
    band: float = 0.35
    max_steps: int = 120
    images: int = 1000
    rows: int = 4096
    budget: float = 0.37
    budgets: tuple[float, ...] = (0.58, 0.26, 0.2)
    penalties: tuple[float, ...] = (0.05, 0.02, 0.1, 0.01)
    rounds: int = 20
    seed: int = 0
    keep: tuple[str, ...] = ("conv1", "fc")
    options: LayerOptions = LayerOptions(form="columns")
    last_start: float = 70.0

    def common(self) -> dict[str, Any]:
        """What all runs of `compress` share."""
        rules = [Rule(path=path, keep=True) for path in self.keep]
        common = {"options": self.options, "rows": self.rows, "seed": self.seed}
        return {**common, "rules": rules, "allocation": "uniform"}


@dataclass(frozen=True, eq=False)
class LayerSolve:
    """One layer solved with one M step.

    Attributes:
        name: of the M step.
        solution: of the ADMM.
        compile_seconds: of tracing and compiling.
        seconds: of the compiled solve.
        error: relative squared error after the activation on held-out images, before any refit.
    """

    name: str
    solution: AdmmSolution
    compile_seconds: float
    seconds: float
    error: float

    @property
    def trace(self) -> plots.Trace:
        """For the picture of the convergence."""
        h, steps = self.solution.history, int(self.solution.num_steps)
        curves = (np.asarray(c)[:steps] for c in (h.objective, h.primal_residual, h.dual_residual))
        return plots.Trace(f"{TITLES[self.name]} ({self.seconds:.1f} s)", *curves)

    def row(self) -> dict[str, Any]:
        """JSON-able."""
        s = self.solution
        return {
            "m_step": self.name,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "iterations": int(s.num_steps),
            "status": Status(int(s.status)).name.lower(),
            "objective": float(s.objective),
            "primal_residual": float(s.primal_residual),
            "dual_residual": float(s.dual_residual),
            "kept_columns": int(jnp.sum(s.kept)),
            "rank": int(s.rank),
            "error_after_held_out": self.error,
        }


@dataclass(frozen=True, eq=False)
class _Digits:
    model: nnx.Module
    calibration: Float32[np.ndarray, "n h w c"]
    x_test: Float32[np.ndarray, "t h w c"]
    y_test: np.ndarray


def _digits(settings: Settings) -> _Digits:
    data, entry = datasets.load(NETWORK), zoo.entry(NETWORK)
    order = np.random.default_rng(settings.seed).permutation(len(data.x_train))[: settings.images]
    return _Digits(zoo.load(NETWORK), entry.preprocess(data.x_train[order]), entry.preprocess(data.x_test), data.y_test)


def _layer_problem(digits: _Digits, settings: Settings) -> tuple[LayerProblem, LayerProblem, Float32[Array, "n p"]]:
    """Calibration rows, held-out rows and the matrix of the chosen layer in the original network."""
    capture = Capture(digits.model, [(digits.calibration,)])
    site = capture.find(settings.layer)
    seen = capture.observe(site)  # type: ignore[arg-type]
    held_out_from = round(0.9 * len(digits.calibration))
    problem, held_out = problems(site, seen, held_out_from, settings.rows, settings.seed)  # type: ignore[arg-type]
    kernel = get(digits.model, tuple(settings.layer.split("/"))).kernel[...]
    return problem, held_out, kernel_to_matrix(kernel)


def _penalty(problem: LayerProblem, shape: tuple[int, int], settings: Settings) -> Penalized:
    """Penalties inside the band in which both parts can be non-zero."""
    low, high = split_band(shape)
    largest, _ = lambda_max(problem)
    sparse = settings.lambda_sparse * largest
    return Penalized(sparse, sparse * low * (high / low) ** settings.band)


def solve_layer(
    problem: LayerProblem,
    held_out: LayerProblem,
    w: Float[Array, "n p"],
    penalty: Penalized,
    settings: Settings,
) -> Iterator[LayerSolve]:
    """The paper's problem on one layer with each M step, compiled first so that only the solve is timed."""
    for name, m_step in M_STEPS.items():
        options = AdmmOptions(m_step=m_step, max_steps=settings.max_steps, check_every=5, rtol=1e-3)
        run = partial(solve, problem, penalty, options=options)
        start = time.perf_counter()
        jax.block_until_ready(run(start=jnp.full_like(w, jnp.nan)))  # compiles; a NaN ends the loop in its first step
        middle = time.perf_counter()
        solution = jax.block_until_ready(run(start=w))
        end = time.perf_counter()
        error = float(relative_error(held_out, solution.sparse + solution.low_rank))
        yield LayerSolve(name, solution, middle - start, end - middle, error)


def _m_step_table(layer: str, solves: Sequence[LayerSolve]) -> Table:
    table = Table(title=f"The paper's ADMM on {layer}, both M steps on the same problem")
    for heading in ("M step", "compile s", "solve s", "iterations", "objective", "‖A+B−M‖/‖M‖", "columns", "rank"):
        table.add_column(heading, justify="left" if heading == "M step" else "right")
    for one in solves:
        row = one.row()
        table.add_row(
            TITLES[one.name],
            f"{one.compile_seconds:.1f}",
            f"{one.seconds:.2f}",
            f"{row['iterations']} ({row['status']})",
            f"{row['objective']:.4f}",
            f"{row['primal_residual']:.1e}",
            str(row["kept_columns"]),
            str(row["rank"]),
        )
    return table


def _one_layer(digits: _Digits, settings: Settings, out: Path, console: Console) -> tuple[list[LayerSolve], list[Path]]:
    """One layer by the paper's method with both M steps: a table and four pictures."""
    console.print(f"1. One layer, {settings.layer}: A + B with A column-sparse and B of low rank")
    problem, held_out, w = _layer_problem(digits, settings)
    penalty = _penalty(problem, (w.shape[0], w.shape[1]), settings)
    solves = list(solve_layer(problem, held_out, w, penalty, settings))
    console.print(_m_step_table(settings.layer, solves))
    return solves, _layer_pictures(out, np.asarray(w), solves, settings.layer)


def _layer_pictures(out: Path, w: np.ndarray, solves: Sequence[LayerSolve], layer: str) -> list[Path]:
    best = solves[0]
    a, b = (np.asarray(part) for part in (best.solution.sparse, best.solution.low_rank))
    note = f"relative error of the response {best.error:.3f} on held-out images"
    return [
        plots.approximation_example(out / "approximation.png", w, a, b, layer=layer, note=note),
        plots.convergence(out / "convergence.png", [s.trace for s in solves], title=f"ADMM on {layer}"),
        plots.singular_values(out / "singular_values.png", w, b, layer=layer),
        plots.column_norms(out / "column_norms.png", w, np.asarray(best.solution.kept), layer=layer),
    ]


def _quiet(_: ProgressEvent) -> None:
    pass


@dataclass(frozen=True, eq=False)
class _Compressed:
    result: pipeline.Result
    row: dict[str, Any]
    loaded_accuracy: float


def _compress(digits: _Digits, settings: Settings, file: Path, console: Console) -> _Compressed:
    """The whole network at the budget: compressed, timed, saved, loaded again; tables."""
    console.print(
        f"2. The whole network without training: params={settings.budget:g}; "
        f"{' and '.join(settings.keep)} stay as they are; form {settings.options.form}"
    )
    reference = accuracy(digits.model, digits.x_test, digits.y_test)
    result = pipeline.compress(
        digits.model, digits.calibration, budget=Budget(params=settings.budget), **settings.common()
    )
    result = comparison.with_fastest_executions(result, digits.x_test)
    row = comparison.compare(
        NETWORK,
        digits.model,
        result,
        digits.x_test,
        digits.y_test,
        reference_accuracy=reference,
        out=file,
        rounds=settings.rounds,
        form=settings.options.form,
    )
    loaded = accuracy(load(file), digits.x_test, digits.y_test)
    console.print(result.report.table())
    console.print(comparison.comparison_table(row, result))
    console.print(comparison.speed_sentence(row))
    console.print(f"Saved to {file}, loaded again: accuracy {loaded:.2f} % (before saving {row['accuracy']:.2f} %).")
    return _Compressed(result, row, loaded)


def _curves(
    digits: _Digits, settings: Settings, first: pipeline.Result, console: Console, start: float
) -> list[plots.Curve]:
    """Accuracy against parameters: the main run's form over budgets, the paper's method over a short penalty path."""
    console.print("3. Accuracy against parameters")
    penalties: list[dict[str, Any]] = [{"lambda_sparse": f, "lambda_rank": f} for f in settings.penalties]
    budgets: list[dict[str, Any]] = [{"budget": Budget(params=f)} for f in settings.budgets]
    targets = [t for pair in zip_longest(penalties, budgets) for t in pair if t is not None]
    results = [first]
    for i, target in enumerate(targets):
        if i and time.perf_counter() - start > settings.last_start:
            console.print(f"  left out, to be done in time: {len(targets) - i} of {len(targets)} points")
            break
        results.append(
            pipeline.compress(digits.model, digits.calibration, **target, **settings.common(), progress=_quiet)
        )
        console.print(f"  {results[-1].report.budget}: {results[-1].report.params:,} parameters", style="dim")

    def curve(label: str, chosen: Sequence[pipeline.Result]) -> plots.Curve:
        params = [r.report.bits / 32 for r in chosen]
        return plots.Curve(label, params, [accuracy(r.model, digits.x_test, digits.y_test) for r in chosen])

    by_budget = [r for r in results if r.budget_met is not None]
    by_penalty = [r for r in results if r.budget_met is None]
    return [
        curve(f"{settings.options.form}, by budget", by_budget),
        curve("the paper's ADMM + refit, by penalties", by_penalty),
    ]


def _curve_picture(out: Path, curves: Sequence[plots.Curve], done: _Compressed, digits: _Digits) -> Path:
    return plots.accuracy_against_params(
        out / "accuracy_against_params.png",
        curves,
        original=(done.result.report.original_bits / 32, done.row["reference_accuracy"]),
        title=f"{NETWORK} network, {len(digits.x_test)} test images, no training",
    )


def run(
    out: Path,
    json_file: Path | None = None,
    *,
    console: Console | None = None,
    command: str = "unified-approx demo",
    started: float | None = None,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Compress the packaged digits network, print tables, write pictures; no network access.

    Args:
        out: folder for the pictures and the compressed network.
        json_file: where to write the results, if anywhere.
        console: where tables go.
        command: as it goes into the results.
        started: `time.perf_counter()` at the start of the command.
        settings: how much is done.

    Returns:
        The row of results.

    Raises:
        ValueError: `out` is a file.
    """
    start = time.perf_counter() if started is None else started
    console = Console() if console is None else console
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; give the name of a folder")
    out.mkdir(parents=True, exist_ok=True)
    digits = _digits(settings)
    solves, pictures = _one_layer(digits, settings, out, console)
    done = _compress(digits, settings, out / FILE_NAME, console)
    curves = _curves(digits, settings, done.result, console, start)
    pictures.append(_curve_picture(out, curves, done, digits))
    seconds = time.perf_counter() - start
    console.print(f"Pictures in {out}: {', '.join(p.name for p in pictures)}. {seconds:.0f} s in all.")
    if json_file is not None:
        checks = {
            "loaded_accuracy": check(done.loaded_accuracy, "==", done.row["accuracy"]),
            "drop": check(done.row["drop"], "<=", 1.0),
            "seconds": check(seconds, "<=", 90.0),
        }
        write_results(
            json_file,
            command,
            [done.row],
            checks,
            seconds=seconds,
            seed=settings.seed,
            repeat_row=True,
            layers=comparison.layer_rows(done.result),
            m_steps=[one.row() for one in solves],
            curves=[asdict(c) for c in curves],
            pictures=[p.name for p in pictures],
        )
    return done.row
