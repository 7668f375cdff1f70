"""One layer at a time, fitted without and with its ReLU: errors after the ReLU over rank and over kept columns.

    python experiments/linear_against_nonlinear.py [--network vgg16] --data DIR --models DIR [--quick]

For every size there is one structure (a rank, or a set of columns), chosen on the Gram matrix, and two matrices of it:

    linear     minimises ||z - (x m' + bias)||^2, z the response before the ReLU, in closed form
    nonlinear  starts there and lowers ||y - relu(x m' + bias)||^2, y = relu(z)

Training images calibrate and choose the iterate; errors are those of test images, relative to ||y||^2, in all and from
the outputs with y > 0 and with y = 0 apart. Layers see the inputs that the original network gives them.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from resumable import Rows, kept

from solvers import columns
from solvers.gram import GramStatistics, best_bias
from solvers.reconstruction import LayerProblem, preactivation, sum_over_chunks, target_energy
from solvers.refine import RefineOptions, blend_for, refine
from solvers.ridge import selection_statistics
from solvers.structure import Structure, column_structure, fit
from unified_approx import datasets, plots, zoo
from unified_approx.capture import Capture, LayerSite
from unified_approx.results import check, read_rows, write_results
from unified_approx.sampling import sample

RESULT = Path(__file__).parent / "results" / "linear_against_nonlinear.json"
WORK = Path(".linear_against_nonlinear")
WEIGHTS = {"vgg16": "vgg16-cifar10.safetensors", "digits": None}
LAYERS = {"vgg16": {"conv2-1": "convs/2", "conv3-1": "convs/4"}, "digits": {"conv2": "conv2", "conv3": "conv3"}}
PARTS = {"low_rank": "rank", "columns": "kept columns"}
FITS = {"linear": "without the ReLU", "nonlinear": "with the ReLU"}

_select = jax.jit(columns.select)
_structure = jax.jit(column_structure)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much data and how many sizes.

    Attributes:
        calibration: training images that are fitted.
        choosing: training images on which the iterate is chosen.
        test: test images on which errors are measured.
        rows_per_feature: sampled output positions, for each input feature.
        fractions: of the largest rank, and of the columns.
        steps: of the nonlinear fit.
        layers: how many of `LAYERS`.
    """

    calibration: int = 1500
    choosing: int = 300
    test: int = 1000
    rows_per_feature: int = 50
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
    steps: int = 15
    layers: int = 2


FULL = Scale()
QUICK = Scale(calibration=200, choosing=50, test=100, rows_per_feature=20, fractions=(0.1, 0.5), steps=6, layers=1)


@dataclass(frozen=True)
class Layer:
    """One layer's rows: to fit, to choose the iterate, to measure."""

    name: str
    fitted: LayerProblem
    choosing: LayerProblem
    test: LayerProblem


def layers(network: str, data: Path | None, models: Path | None, scale: Scale, seed: int) -> Iterator[Layer]:
    """Rows of the layers in `LAYERS`, one after the other."""
    entry, file = zoo.entry(network), WEIGHTS[network]
    images = datasets.load(entry.dataset, data)
    train = scale.calibration + scale.choosing
    chosen = np.random.default_rng(seed).permutation(len(images.x_train))[:train]
    x = entry.preprocess(np.concatenate([images.x_train[chosen], images.x_test[: scale.test]]))
    model = zoo.load(network, None if file is None or models is None else models / file)
    capture = Capture(model, [(x[i : i + 100],) for i in range(0, len(x), 100)])
    for name, path in list(LAYERS[network].items())[: scale.layers]:
        site = capture.find(path)
        assert isinstance(site, LayerSite)
        seen = capture.observe(site)
        entries = np.split(np.arange(len(x)), [scale.calibration, train])
        d = scale.rows_per_feature * site.geometry.matrix_shape.p
        yield Layer(name, *(sample(site, seen, e, n, seed) for e, n in zip(entries, (d, d // 4, d // 2), strict=True)))


@jax.jit
def split_errors(
    problem: LayerProblem, m: Float[Array, "n p"], bias: Float[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """||y - r(x m' + bias)||^2 / ||y||^2 over the outputs with y > 0, and over those with y = 0; they add up."""

    def body(x: Array, y: Array) -> tuple[Array, Array]:
        gap = (y - problem.activation(preactivation(x, m, bias, None))) ** 2
        return jnp.sum(jnp.where(y > 0, gap, 0)), jnp.sum(jnp.where(y > 0, 0, gap))

    positive, zero = sum_over_chunks(body, (problem.x, problem.y))
    return positive / target_energy(problem), zero / target_energy(problem)


def structure_of(part: str, size: int, stats: GramStatistics, w: Float[Array, "n p"]) -> tuple[Structure, int]:
    """The structure of one size, and how many columns it reads."""
    p = w.shape[1]
    none, every = jnp.zeros(p, bool), jnp.ones(p, bool)
    if part == "low_rank":
        return _structure(stats.gram, none, every, size), p
    return _structure(stats.gram, _select(stats.gram, w, size), none, 0), size


def fit_both(layer: Layer, part: str, size: int, steps: int) -> Rows:
    """Both fits of one structure, measured."""
    fitted, choosing = layer.fitted, layer.choosing
    found = selection_statistics(fitted, choosing, ridge=1e-6, float64_up_to=1536)
    with jax.enable_x64(found.wide):
        structure, read = structure_of(part, size, found.stats, found.w)
        matrix = fit(structure, found.stats.cross)
        bias = best_bias(found.stats, matrix)
        structure, stats = structure.astype(jnp.float32), jax.tree.map(lambda a: a.astype(jnp.float32), found.stats)
        linear = matrix.astype(jnp.float32), bias.astype(jnp.float32)
    blend = blend_for(len(fitted.x), float(jnp.mean(fitted.y > 0)), read)
    refined = refine(fitted, choosing, stats, structure, *linear, blend, RefineOptions(steps=steps))
    n, p = linear[0].shape
    rows = []
    for name, (m, b) in {"linear": linear, "nonlinear": (refined.matrix, refined.bias)}.items():
        positive, zero = (float(e) for e in split_errors(layer.test, m, b))
        row = {"layer": layer.name, "n": n, "p": p, "part": part, "size": size, "fit": name}
        row |= {"error": positive + zero, "error_positive": positive, "error_zero": zero}
        rows.append({**row, "rows": len(fitted.x), "active": float(jnp.mean(layer.test.y > 0))})
    return rows


def sizes(part: str, n: int, p: int, fractions: Sequence[float]) -> list[int]:
    """Ranks or numbers of columns."""
    largest = min(n, p) if part == "low_rank" else p
    return sorted({max(1, round(f * largest)) for f in fractions})


def measure(
    network: str, *, data: Path | None, models: Path | None, work_dir: Path, quick: bool = False, seed: int = 0
) -> Rows:
    """All rows of a network; those in the work folder are not made again."""
    scale = QUICK if quick else FULL
    work = work_dir / f"{network}-{'quick' if quick else 'full'}-{seed}"
    done = work / "all.json"
    if done.exists():
        return json.loads(done.read_text())
    rows: Rows = []
    for layer in layers(network, data, models, scale, seed):
        n, p = layer.fitted.y.shape[1], layer.fitted.x.shape[1]
        for part in PARTS:
            for size in sizes(part, n, p, scale.fractions):
                make = lambda layer=layer, part=part, size=size: fit_both(layer, part, size, scale.steps)  # noqa: E731
                rows += kept(work, f"{part}-{layer.name}-{size}", make)
    return kept(work, "all", lambda: rows)


def gains(rows: Rows) -> dict[tuple[str, str, int], float]:
    """Error with the ReLU divided by the error without, for each layer, part and size."""
    by = {(r["layer"], r["part"], r["size"], r["fit"]): r["error"] for r in rows}
    return {key[:3]: error / by[(*key[:3], "linear")] for key, error in by.items() if key[3] == "nonlinear"}


def checks_of(rows: Rows) -> dict[str, Any]:
    """On unseen images the ReLU never costs anything, and it pays most where the layer is compressed most."""
    found = {"largest_ratio": check(max(gains(rows).values()), "<=", 1.0)}
    for layer in dict.fromkeys(r["layer"] for r in rows):
        smallest = [ratio for (name, part, _), ratio in gains(rows).items() if name == layer and part == "low_rank"]
        found[f"{layer}_smallest_rank_ratio"] = check(smallest[0], "<=", 0.9)
    return found


def picture(rows: Rows, path: Path) -> Path:
    """A PNG: for each layer and part the whole error, that of outputs with y > 0 and that of those with y = 0."""
    lines = list(dict.fromkeys((r["layer"], r["part"]) for r in rows))
    titles = {"error": "all outputs", "error_positive": "outputs with y > 0", "error_zero": "outputs with y = 0"}
    figure = Figure(figsize=(10, 2.5 * len(lines)), layout="constrained")
    grid = figure.subplots(len(lines), 3, squeeze=False)
    for panels, (layer, part) in zip(grid, lines, strict=True):
        chosen = [r for r in rows if (r["layer"], r["part"]) == (layer, part)]
        for axes, (field, title) in zip(panels, titles.items(), strict=True):
            for (fit_name, label), colour, marker in zip(
                FITS.items(), (plots.VERMILLION, plots.BLUE), "so", strict=True
            ):
                curve = [(r["size"], r[field]) for r in chosen if r["fit"] == fit_name]
                axes.semilogy(*zip(*curve, strict=True), color=colour, marker=marker, markersize=4, label=label)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(PARTS[part])
            axes.set_title(f"{layer}, {title}", loc="left", fontsize=10)
            axes.grid(True, color="#E6E6E6", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("error / ‖y‖²")
    grid[0][0].legend(frameon=False)
    figure.savefig(path, dpi=90)
    return path


def run(
    network: str,
    *,
    data: Path | None,
    models: Path | None,
    work_dir: Path = WORK,
    json_file: Path = RESULT,
    quick: bool = False,
    seed: int = 0,
) -> Rows:
    """Measure and write the result file, unless it holds the same rows already; arguments as on the command line."""
    start = time.perf_counter()
    rows = measure(network, data=data, models=models, work_dir=work_dir, quick=quick, seed=seed)
    command = f"python experiments/linear_against_nonlinear.py --network {network}" + (" --quick" if quick else "")
    if json_file.exists() and read_rows(json_file) == rows:
        return rows
    seconds = time.perf_counter() - start
    write_results(json_file, command, rows, checks_of(rows), seconds=seconds, seed=seed, quick=quick, network=network)
    return rows


def main(
    network: str = "vgg16",
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    models: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_MODELS")] = None,
    seed: int = 0,
    quick: bool = False,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
    work_dir: Annotated[Path, typer.Option(help="Finished rows are kept here; a killed run resumes.")] = WORK,
) -> None:
    """Measure, and write the table."""
    where = {"data": data, "models": models, "work_dir": work_dir, "json_file": json_file}
    rows = run(network, **where, quick=quick, seed=seed)
    for row in rows:
        print({k: row[k] for k in ("layer", "part", "size", "fit", "error", "error_positive", "error_zero")})
    print(json.dumps(checks_of(rows), indent=1))


if __name__ == "__main__":
    typer.run(main)
