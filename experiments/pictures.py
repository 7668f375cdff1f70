"""Pictures for the notebooks: small enough to be stored in them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import IPython.display
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image


def show(path: Path, width: int = 760, colours: int = 64) -> IPython.display.Image:
    """A PNG file for display, with few colours, which takes a third of the bytes.

    Args:
        path: the file; it is left as it is.
        width: on the screen.
        colours: how many stay.
    """
    small = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return IPython.display.Image(data=small.getvalue(), width=width)


def penalty_maps(
    path: Path,
    panels: Mapping[str, Float[np.ndarray, "rows columns"]],
    rows: Sequence[float],
    columns: Sequence[float],
    *,
    row_label: str,
    column_label: str,
    formats: str | Sequence[str] = "{:.0f}",
    marks: Sequence[float] = (),
) -> Path:
    """Tables side by side, each entry a coloured cell with its number in it.

    Args:
        path: PNG to write.
        panels: title -> one value for each row and column.
        rows: values of the weight that grows upwards.
        columns: values of the weight that grows to the right.
        row_label: what the rows are.
        column_label: what the columns are.
        formats: of the numbers, one for each panel or one for all.
        marks: values on the columns' scale at which a vertical line is drawn, between the cells.

    Returns:
        `path`.
    """
    figure = Figure(figsize=(4.6 * len(panels), 3.9), layout="constrained")
    texts = [formats] * len(panels) if isinstance(formats, str) else formats
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, values), text in zip(grid, panels.items(), texts, strict=True):
        axes.imshow(values, cmap="Blues", origin="lower", aspect="auto")
        dark = np.nanmin(values) + 0.6 * (np.nanmax(values) - np.nanmin(values))
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, text.format(value), ha="center", va="center", color="white" if value > dark else "black")
        for mark in marks:
            place = np.interp(np.log(mark), np.log(columns), np.arange(len(columns)))
            axes.axvline(float(place), color="#D55E00", linestyle="--")
        axes.set_xticks(range(len(columns)), [f"{c:.2g}" for c in columns])
        axes.set_yticks(range(len(rows)), [f"{r:.2g}" for r in rows])
        axes.set(xlabel=column_label, ylabel=row_label)
        axes.set_title(title, loc="left")
    figure.savefig(path, dpi=100)
    return path


def curves(
    path: Path,
    panels: Mapping[str, Mapping[str, Float[np.ndarray, " steps"]]],
    steps: Sequence[float],
    *,
    step_label: str,
    logarithmic: Sequence[str] = (),
) -> Path:
    """Lines over the same steps, panel beside panel.

    Args:
        path: PNG to write.
        panels: title -> label of a line -> its values; a line of an empty label is not in the legend.
        steps: where the values are, on a logarithmic scale.
        step_label: what the steps are.
        logarithmic: titles of the panels whose values are on a logarithmic scale too.

    Returns:
        `path`.
    """
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, values in lines.items():
            axes.plot(steps, values, marker=".", label=label or None)
        axes.set(xlabel=step_label, xscale="log", yscale="log" if title in logarithmic else "linear")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        if any(lines):
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2, "fontsize": "small"}
            axes.legend(frameon=False, **(below if len(lines) > 4 else {}))
    figure.savefig(path, dpi=100)
    return path


def bars(
    path: Path,
    panels: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    stacked: bool = True,
    logarithmic: bool = False,
) -> Path:
    """Bars of parts, panel beside panel.

    Args:
        path: PNG to write.
        panels: title -> name of a bar -> name of a part -> its length.
        stacked: one part on the other; otherwise over each other, translucent and without gaps, as histograms.
        logarithmic: lengths on a logarithmic scale.

    Returns:
        `path`.
    """
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, (title, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        parts = list(dict.fromkeys(part for bar in columns.values() for part in bar))
        places, bottom = np.arange(len(columns)), np.zeros(len(columns))
        for part in parts:
            lengths = np.array([bar.get(part, 0.0) for bar in columns.values()])
            look = {"bottom": bottom, "width": 0.7} if stacked else {"alpha": 0.6, "width": 1.0}
            axes.bar(places, lengths, label=part or None, **look)
            bottom += lengths
        shown = places[:: max(1, len(places) // 6)]
        axes.set_xticks(shown, [list(columns)[i] for i in shown])
        axes.set_yscale("log" if logarithmic else "linear")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        if any(parts):
            axes.legend(frameon=False)
    figure.savefig(path, dpi=100)
    return path


def tiles(path: Path, rows: Mapping[str, Float[np.ndarray, "tiles h w"]]) -> Path:
    """Small images in rows, all in one colour scale around zero.

    Args:
        path: PNG to write.
        rows: title -> images.

    Returns:
        `path`.
    """
    limit = float(np.quantile(np.abs(np.stack(list(rows.values()))), 0.995))
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.1 * count + 0.2, 1.35 * len(rows)), layout="constrained")
    for line, (title, images) in zip(figure.subplots(len(rows), count, squeeze=False), rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, cmap="RdBu", vmin=-limit, vmax=limit)
            axes.set_axis_off()
        line[0].set_title(title, loc="left")
    figure.savefig(path, dpi=100)
    return path
