"""How accuracy falls: over sparsity, over bits, over compression; and what sparse and shared layers cost in time.

    python experiments/deep_curves.py --data DIR [--part sparsity ...] [--quick]

Takes the trained networks of `deep_compression.py` from its work folder (they are made if they are not there). A killed
run resumes. Pictures are written beside the results.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from deep_compression import WORK, Pipeline
from flax import nnx
from jax.experimental import sparse
from jaxtyping import Array
from matplotlib.figure import Figure
from resumable import Rows, kept

from solvers.terms import Codebook
from unified_approx import finetune_compressed, storage
from unified_approx.deep_compression import prune, share
from unified_approx.im2col import Geometry
from unified_approx.layers import FactoredLinear
from unified_approx.learning_compression import LcResult, direct_compression, parse_tasks
from unified_approx.pieces import parameters_of
from unified_approx.results import write_results

RESULT = Path(__file__).parent / "results" / "deep_curves.json"
FRACTIONS = (0.5, 0.3, 0.2, 0.1, 0.06, 0.04, 0.02)
BITS = range(2, 9)
INITS = ("linear", "random", "density")
RANKS = {"lenet300": (60, 30, 15, 8, 4)}
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
LAYER = 2048  # inputs and outputs of the dense layer that is timed


class Curves:
    """All curves of one network."""

    def __init__(self, network: str, data: Path | None, work: Path, quick: bool):
        self.pipeline = Pipeline(network, data, work, quick)
        self.pipeline.rows()
        self.folder, self.quick = self.pipeline.work, quick
        self.model = storage.load(self.folder / "reference.uapk")
        tuning = self.pipeline.setting.tuning
        self.recipe = replace(tuning, epochs=1 if quick else max(2, tuning.epochs // 2))

    def sparsity(self) -> Rows:
        """Pruned at once, pruned and trained, pruned and trained from fraction to fraction."""
        rows, iterated = [], self.model
        for fraction in FRACTIONS:
            once = direct_compression(self.model, parse_tasks(f".*=prune({fraction})"))
            iterated = self._pruned(iterated, fraction)
            ways = {"pruned": once.model, "retrained": self._pruned(self.model, fraction), "iterative": iterated}
            rows += [self._row(way, model, kept=fraction) for way, model in ways.items()]
        return rows

    def histograms(self) -> Rows:
        """Of the weights of the largest layer, before and after."""
        sizes = {path: value.size for path, value in parameters_of(self.model).items()}
        path = max(sizes, key=lambda path: sizes[path])
        edges = np.linspace(-0.3, 0.3, 61)
        rows = []
        for stage in ("reference", "pruned_published", "shared_published"):
            weights = np.asarray(parameters_of(storage.load(self.folder / f"{stage}.uapk"))[path]).reshape(-1)
            counts = np.histogram(weights[weights != 0], edges)[0]
            rows.append(
                {"network": self.pipeline.name, "name": stage, "edges": edges.tolist(), "counts": counts.tolist()}
            )
        return rows

    def starts(self) -> Rows:
        """Three starts of k-means on the pruned network, before and after the values are trained."""
        pruned, rows = storage.load(self.folder / "pruned_published.uapk"), []
        for bits in BITS:
            for init in INITS:
                before = share(pruned, bits, init=init)
                rows.append(self._row(init, before.model, bits=bits, trained=False))
                rows.append(self._row(init, self._tuned(before), bits=bits, trained=True))
        return rows

    def layers(self) -> Rows:
        """Bits of the convolutions alone and of the dense layers alone, pruned and not; nothing is trained."""
        rows = []
        for stage in ("reference", "pruned_published"):
            model = storage.load(self.folder / f"{stage}.uapk")
            for kind in ("conv", "fc"):
                for bits in range(1, 9):
                    done = share(model, bits, layers=f"{kind}.*").model
                    rows.append(self._row(f"{kind}, {stage.split('_')[0]}", done, bits=bits))
        return rows

    def methods(self) -> Rows:
        """Accuracy over the file's size: pruning, sharing, both, and SVD; all trained for as long."""
        rows = []
        for fraction in FRACTIONS:
            pruned = self._pruned(self.model, fraction)
            rows.append(self._row("pruning", pruned, kept=fraction))
            rows.append(self._row("pruning and sharing", self._tuned(share(pruned, 4)), kept=fraction, bits=4))
        rows += [self._row("sharing", self._tuned(share(self.model, bits)), bits=bits) for bits in (1, 2, 3, 4, 6)]
        for rank in RANKS[self.pipeline.name]:
            factored = direct_compression(self.model, parse_tasks(f"fc1=low_rank({rank}),fc2=low_rank({rank})"))
            trained = self._finetuned(factored)
            rows.append(self._row("SVD", trained.rebuilt(), judged=trained.model, rank=rank))
        return rows

    def _pruned(self, model: nnx.Module, fraction: float) -> nnx.Module:
        images = self.pipeline.images
        return prune(model, images.x, images.y, {".*": fraction}, recipe=self.recipe, validation=images.held).model

    def _finetuned(self, result: LcResult) -> LcResult:
        images = self.pipeline.images
        return finetune_compressed(result, images.x, images.y, self.recipe, validation=images.held)

    def _tuned(self, result: LcResult) -> nnx.Module:
        return self._finetuned(result).model

    def _row(self, name: str, model: nnx.Module, judged: nnx.Module | None = None, **more: Any) -> dict[str, Any]:
        size = storage.pack(self.folder / "curve.uapk", model)
        error = self.pipeline.images.error(judged or model)
        print(self.pipeline.name, name, more, f"{error:.2f} %, {size:,} bytes", flush=True)
        return {"network": self.pipeline.name, "name": name, "error": error, "file_bytes": size, **more}


def speed(quick: bool) -> Rows:
    """A dense layer in every form, over its density: milliseconds, and against the dense product."""
    size, rng = (256 if quick else LAYER), np.random.default_rng(0)
    rows = []
    for batch in (1, 64):
        x = jnp.asarray(rng.standard_normal((batch, size)), jnp.float32)
        for density in DENSITIES[:2] if quick else DENSITIES:
            forms = _forms(rng, size, density)
            seconds = _times(list(forms.values()), x, 5 if quick else 15)
            for name, own in zip(forms, seconds, strict=True):
                ratio = seconds[0] / own
                rows.append({"name": name, "batch": batch, "density": density, "ms": 1e3 * own, "speedup": ratio})
                print(rows[-1], flush=True)
    return rows


def _forms(rng: np.random.Generator, size: int, density: float) -> dict[str, Callable[[Array], Array]]:
    """The same layer, dense first."""
    values = rng.standard_normal(16).astype(np.float32)
    codes = np.where(rng.random((size, size)) < density, rng.integers(1, 17, (size, size)), 0).astype(np.int32)
    matrix = jnp.asarray(np.pad(values, (1, 0))[codes])
    rows, columns = sparse.BCOO.fromdense(matrix), sparse.BCSR.fromdense(matrix)
    layer = FactoredLinear.from_terms([Codebook(values, codes)], None, Geometry((), size, size))
    graph, state = nnx.split(layer.with_execution("factored:decode"))
    looked, own = nnx.split(layer.with_execution("factored:lookup"))
    product = jax.jit(lambda w, x: x @ w.T)
    by_codes = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    by_sums = jax.jit(lambda state, x: nnx.merge(looked, state)(x))
    of_sparse = jax.jit(lambda w, x: (w @ x.T).T)
    forms: dict[str, Callable[[Array], Array]] = {
        "dense, or decoded once": lambda x: product(matrix, x),
        "BCOO": lambda x: of_sparse(rows, x),
        "CSR": lambda x: of_sparse(columns, x),
        "decoded in every call": lambda x: by_codes(state, x),
    }
    return forms | ({"look-up tables": lambda x: by_sums(own, x)} if size <= 512 or density == DENSITIES[0] else {})


def _times(forms: Sequence[Callable[[Array], Array]], x: Array, repeats: int) -> list[float]:
    """Medians, the forms in turn."""
    for form in forms:
        jax.block_until_ready(form(x))
    seconds: list[list[float]] = [[] for _ in forms]
    for _ in range(repeats):
        for own, form in zip(seconds, forms, strict=True):
            clock = time.perf_counter()
            jax.block_until_ready(form(x))
            own.append(time.perf_counter() - clock)
    return [median(own) for own in seconds]


def draw(rows: Rows, folder: Path) -> list[Path]:
    """A picture for each part that has curves."""
    axes_of = {
        "sparsity": ("kept", "weights that stay"),
        "starts": ("bits", "bits of a code"),
        "layers": ("bits", "bits of a code"),
        "methods": ("file_bytes", "bytes of the file"),
        "speed": ("density", "weights that are not zero"),
    }
    written = [_draw_histograms(own, folder)] if (own := [row for row in rows if row["part"] == "histograms"]) else []
    for part, (field, label) in axes_of.items():
        own = [row for row in rows if row["part"] == part]
        if own:
            written.append(_draw(own, field, label, folder / f"deep_{part}.png"))
    return written


def _draw_histograms(rows: Rows, folder: Path) -> Path:
    """Weights that are not zero, before and after: a row of pictures for each network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    stages = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(3.6 * len(stages), 2.6 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), len(stages), sharex=True, squeeze=False)
    for row in rows:
        axes = grid[networks.index(row["network"]), stages.index(row["name"])]
        axes.stairs(row["counts"], row["edges"], fill=True)
        axes.set_title(f"{row['network']}, {row['name'].split('_')[0]}: {sum(row['counts']):,}", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("weight of the largest layer, zeros left out")
    path = folder / "deep_histograms.png"
    figure.savefig(path, dpi=100)
    return path


def _draw(rows: Rows, field: str, label: str, path: Path) -> Path:
    value = "ms" if "ms" in rows[0] else "error"
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    keys = ("name", "trained", "batch")
    lines = dict.fromkeys(tuple(row.get(key) for key in keys) for row in rows)
    for line in lines:
        own = [row for row in rows if tuple(row.get(key) for key in keys) == line]
        name, trained, batch = line
        more = {None: "", True: ", trained", False: ", not trained"}[trained] + (f", batch {batch}" if batch else "")
        axes.plot(
            [row[field] for row in own], [row[value] for row in own], "--" if trained is False else "-", marker=".",
            label=f"{name}{more}",
        )  # fmt: skip
    axes.set(xlabel=label, ylabel="milliseconds" if value == "ms" else "test error, %", yscale="log")
    axes.set_xscale("linear" if field == "bits" else "log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)
    return path


PARTS = {"lenet300": ("sparsity", "histograms", "starts", "methods"), "lenet5": ("histograms", "layers")}


def main(
    data: Annotated[Path | None, typer.Option(envvar="UNIFIED_APPROX_DATA")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Parts to make; others are taken if they are there.")] = None,
    quick: bool = False,
    work_dir: Annotated[Path, typer.Option(help="Of deep_compression.py.")] = WORK,
    json_file: Annotated[Path, typer.Option("--json")] = RESULT,
) -> None:
    """Make the curves."""
    start, rows = time.perf_counter(), list[dict[str, Any]]()
    work = work_dir / ("quick" if quick else "full")
    known = {*(name for names in PARTS.values() for name in names), "speed"}
    wanted = set(part or known)
    if wanted - known:
        raise typer.BadParameter(f"--part: {min(wanted - known)!r} is unknown; there are {', '.join(sorted(known))}")
    for network, names in PARTS.items():
        curves: list[Curves] = []
        for name in names:

            def make(network: str = network, name: str = name, curves: list[Curves] = curves) -> Rows:
                curves += [] if curves else [Curves(network, data, work, quick)]
                return getattr(curves[0], name)()

            if name in wanted or (work / f"{name}-{network}.json").exists():
                rows += kept(work, f"{name}-{network}", make)
    if "speed" in wanted or (work / "speed-layer.json").exists():
        rows += kept(work, "speed-layer", lambda: speed(quick))
    seconds = time.perf_counter() - start
    command = "python experiments/deep_curves.py" + (" --quick" if quick else "")
    write_results(json_file, command, rows, seconds=seconds, seed=0, quick=quick)
    print(json.dumps([str(path) for path in draw(rows, json_file.parent)], indent=1))


if __name__ == "__main__":
    typer.run(main)
