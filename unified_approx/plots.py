"""Pictures of what a compression does, one function each: arrays in, a file out. No global state, no display needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from jaxtyping import Array, Bool, Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

AnyArray = np.ndarray | Array
FilePath = str | PathLike[str]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILLION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#9A9A9A"
_CYCLE = (BLUE, VERMILLION, GREEN, ORANGE)
_MARKERS = ("o", "s", "^", "D")
_DPI = 150


@dataclass(frozen=True)
class Trace:
    """Curves of one solve, one entry per iteration, NaN where nothing was measured.

    Attributes:
        label: what the legend calls it.
        objective: loss + penalties at the feasible point.
        primal_residual: relative.
        dual_residual: relative.
    """

    label: str
    objective: Float[AnyArray, " steps"]
    primal_residual: Float[AnyArray, " steps"]
    dual_residual: Float[AnyArray, " steps"]


@dataclass(frozen=True)
class Curve:
    """Accuracy of a network at several sizes.

    Attributes:
        label: what the legend calls it.
        params: stored values, indices counted as bits / 32.
        accuracy: in percent.
    """

    label: str
    params: Sequence[float]
    accuracy: Sequence[float]


def _tidy(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _save(figure: Figure, path: FilePath) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=_DPI)
    return target


def approximation_example(
    path: FilePath,
    original: Float[AnyArray, "n p"],
    sparse: Float[AnyArray, "n p"],
    low_rank: Float[AnyArray, "n p"],
    *,
    layer: str = "",
    note: str = "",
) -> Path:
    """The original matrix above its sparse part, its low-rank part and their sum, in one colour scale.

    Args:
        path: PNG, PDF or SVG to write; its folder is made.
        original: the layer's matrix.
        sparse: a, column-sparse.
        low_rank: b.
        layer: its name, for the title.
        note: appended to the title of the sum, an error say.
    """
    w, a, b = (np.asarray(part) for part in (original, sparse, low_rank))
    kept, rank = int(np.any(a != 0, axis=0).sum()), int(np.linalg.matrix_rank(b))
    panels = (
        (f"original matrix of {layer}" if layer else "original matrix", w),
        (f"sparse part: {kept} of {w.shape[1]} columns", a),
        (f"low-rank part: rank {rank} of {min(w.shape)}", b),
        ("sparse + low-rank" + (f": {note}" if note else ""), a + b),
    )
    limit = float(np.quantile(np.abs(w), 0.97)) or 1.0
    figure = Figure(figsize=(9, 8), layout="constrained")
    rows = figure.subplots(4, 1, sharex=True, sharey=True)
    image = None
    for axes, (title, matrix) in zip(rows, panels, strict=True):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylabel("output channel")
    rows[-1].set_xlabel("input feature (column)")
    assert image is not None
    figure.colorbar(image, ax=list(rows), label="weight", extend="both", fraction=0.03, pad=0.01)
    return _save(figure, path)


def convergence(path: FilePath, traces: Sequence[Trace], *, title: str = "") -> Path:
    """Objective and both relative residuals over the iterations, for one or several solves of one problem.

    Args:
        path: PNG, PDF or SVG to write; its folder is made.
        traces: one entry per solve.
        title: above both panels.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = (_tidy(axes) for axes in figure.subplots(1, 2))
    for trace, colour in zip(traces, _CYCLE * len(traces), strict=False):
        steps = np.arange(1, len(trace.objective) + 1)
        objective = np.asarray(trace.objective)
        judged = np.isfinite(objective)
        left.plot(steps[judged], objective[judged], color=colour, marker="o", markersize=3, label=trace.label)
        for name, values, style in (("primal", trace.primal_residual, "-"), ("dual", trace.dual_residual, "--")):
            right.plot(steps, np.asarray(values), color=colour, linestyle=style, label=f"{trace.label}, {name}")
    left.set_ylabel("objective (loss + penalties)")
    right.set_ylabel("relative residual")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("ADMM iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    if title:
        figure.suptitle(title)
    return _save(figure, path)


def singular_values(
    path: FilePath, original: Float[AnyArray, "n p"], low_rank: Float[AnyArray, "n p"], *, layer: str = ""
) -> Path:
    """Singular values of a layer's matrix and of its low-rank part, with the kept rank.

    Args:
        path: PNG, PDF or SVG to write; its folder is made.
        original: the layer's matrix.
        low_rank: b; its rank is read off its singular values.
        layer: its name, for the title.
    """
    before, after = (np.linalg.svd(np.asarray(m), compute_uv=False) for m in (original, low_rank))
    rank = int(np.linalg.matrix_rank(np.asarray(low_rank)))
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = _tidy(figure.subplots())
    number = np.arange(1, len(before) + 1)
    axes.plot(number, before, color=GREY, marker="o", markersize=3.5, label="original matrix")
    axes.plot(number[:rank], after[:rank], color=VERMILLION, marker="s", markersize=4, label="low-rank part")
    axes.axvline(rank + 0.5, color=BLUE, linestyle="--", label=f"kept rank: {rank} of {len(before)}")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, len(before) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="number, largest first", ylabel="singular value")
    axes.set_title(f"Singular values of {layer}" if layer else "Singular values", loc="left")
    axes.legend(frameon=False)
    return _save(figure, path)


def column_norms(
    path: FilePath, original: Float[AnyArray, "n p"], kept: Bool[AnyArray, " p"], *, layer: str = ""
) -> Path:
    """Norms of the columns of a layer's matrix, largest first, those that the sparse part keeps in colour.

    Args:
        path: PNG, PDF or SVG to write; its folder is made.
        original: the layer's matrix.
        kept: which columns the sparse part has.
        layer: its name, for the title.
    """
    norms, mask = np.linalg.norm(np.asarray(original), axis=0), np.asarray(kept)
    order = np.argsort(-norms, kind="stable")
    norms, mask = norms[order], mask[order]
    number = np.arange(1, len(norms) + 1)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = _tidy(figure.subplots())
    for chosen, colour, label in (
        (~mask, "#C8C8C8", f"dropped from the sparse part: {int((~mask).sum())}"),
        (mask, BLUE, f"kept: {int(mask.sum())}"),
    ):
        axes.bar(number[chosen], norms[chosen], width=1.0, color=colour, label=label)
    axes.set_xlim(0.5, len(norms) + 0.5)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="column (input feature), largest norm first", ylabel="norm of the column")
    axes.set_title(f"Columns of {layer}" if layer else "Columns", loc="left")
    axes.legend(frameon=False)
    return _save(figure, path)


def accuracy_against_params(
    path: FilePath,
    curves: Sequence[Curve],
    *,
    original: tuple[float, float],
    title: str = "",
) -> Path:
    """Test accuracy against the number of stored parameters, one curve per method.

    Args:
        path: PNG, PDF or SVG to write; its folder is made.
        curves: what was measured.
        original: parameters and accuracy of the original network.
        title: above the picture.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = _tidy(figure.subplots())
    axes.axhline(original[1], color=GREY, linestyle=":", label=f"original: {original[1]:.1f} %")
    for i, curve in enumerate(curves):
        order = np.argsort(curve.params)
        params, accuracy = (np.asarray(v, float)[order] for v in (curve.params, curve.accuracy))
        colour, marker = _CYCLE[i % len(_CYCLE)], _MARKERS[i % len(_MARKERS)]
        axes.plot(params / 1e3, accuracy, color=colour, marker=marker, label=curve.label)
    axes.plot(original[0] / 1e3, original[1], color="black", marker="*", markersize=12, linestyle="none")
    axes.set_xlim(left=0)
    axes.set(xlabel="stored parameters (thousands, indices included)", ylabel="test accuracy (%)")
    if title:
        axes.set_title(title, loc="left")
    axes.legend(frameon=False, loc="lower right")
    return _save(figure, path)


_AXIS_NAMES = {"cr": "compression ratio (bits)", "macs": "original / compressed multiply-adds", "speedup": "speed-up"}


def tradeoff(
    path: FilePath, series: Mapping[str, Sequence[tuple[float, float]]], *, axis: str, reference: float | None = None
) -> Path:
    """Accuracy against a ratio, several methods; points that no other beats in both carry a ring.

    Args:
        path: PNG, PDF or SVG to write; its folder is made.
        series: (ratio, accuracy) points by method.
        axis: "cr", "macs" or "speedup".
        reference: accuracy of the original.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = _tidy(figure.subplots())
    if reference is not None:
        axes.axhline(reference, color=GREY, linestyle=":", label=f"original: {reference:.2f} %")
    for i, (name, points) in enumerate(series.items()):
        ratio, accuracy = np.array(sorted(points)).T
        colour, marker = _CYCLE[i % len(_CYCLE)], _MARKERS[i % len(_MARKERS)]
        axes.plot(ratio, accuracy, color=colour, marker=marker, label=name)
    front = np.array(pareto_front([p for points in series.values() for p in points]))
    ring = {"facecolors": "none", "edgecolors": "black", "s": 110, "linewidths": 1.2}
    axes.scatter(front[:, 0], front[:, 1], label="Pareto front", zorder=3, **ring)
    axes.set(xlabel=_AXIS_NAMES[axis], ylabel="test accuracy (%)")
    axes.legend(frameon=False, loc="lower left")
    return _save(figure, path)


def sensitivity_curves(
    path: FilePath, layers: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str = ""
) -> Path:
    """What is expected of the network's output when one layer alone is made smaller, a curve for every layer.

    Args:
        path: PNG, PDF or SVG to write; its folder is made.
        layers: by name, in the network's order: fractions of the stored values kept, and losses in nats.
        title: above the picture.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = _tidy(figure.subplots())
    scale = ScalarMappable(Normalize(0, max(1, len(layers) - 1)), "viridis")
    colours = scale.to_rgba(np.arange(len(layers)))
    for (name, (kept, loss)), colour in zip(layers.items(), colours, strict=True):
        shown = np.asarray(loss) > 0
        axes.plot(np.asarray(kept)[shown], np.asarray(loss)[shown], color=colour, label=name, linewidth=1.3)
    axes.set(yscale="log", xlabel="stored values of the layer kept (fraction)", ylabel="loss of the output (nats)")
    if len(layers) <= 14:
        axes.legend(frameon=False, fontsize="x-small", loc="upper right", ncols=2)
    else:
        figure.colorbar(scale, ax=axes, label="layer, from the input to the output")
    if title:
        axes.set_title(title, loc="left")
    return _save(figure, path)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (ratio, accuracy) that no other point reaches or beats in both, by increasing ratio."""
    front: list[tuple[float, float]] = []
    for ratio, accuracy in sorted(set(points), reverse=True):
        if not front or accuracy > front[-1][1]:
            front.append((ratio, accuracy))
    return front[::-1]
