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
