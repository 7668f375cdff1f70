"""What one layer could become: sizes with their costs and their error."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log2

import numpy as np
from jaxtyping import Array, Float

from solvers.curves import ErrorCurves, fit_columns, fit_rank
from solvers.forms import largest_count, largest_rank
from solvers.gram import GramStatistics
from solvers.terms import MatrixShape, index_bits

_SIZES = np.geomspace(0.02, 0.92, 24)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One size of one layer.

    Attributes:
        form: "dense", "columns" or "low_rank": the cheaper of two simple forms, which stands for the size.
        size: kept columns, or rank.
        values: stored values; an index counts its bits / 32.
        macs: multiply-adds per example.
        error: relative squared error before the activation.
        loss: expected fall of the network's output, in nats, when this layer alone is so; 0 for dense.
        seconds: per batch of 64 on this machine, in the fastest execution; None where nothing was timed.
    """

    form: str
    size: int
    values: float
    macs: float
    error: float
    loss: float = 0.0
    seconds: float | None = None

    def cost(self, name: str) -> float:
        """What a budget of that name counts."""
        if name == "latency":
            assert self.seconds is not None
            return self.seconds
        return self.macs if name == "macs" else self.values


@dataclass(frozen=True, kw_only=True)
class LayerMenu:
    """The sizes of one layer, dense last.

    Attributes:
        name: of the layer.
        shape: of its matrix.
        positions: output positions per example, all calls together.
        items: by increasing size.
    """

    name: str
    shape: tuple[int, int]
    positions: int
    items: tuple[Item, ...]


def make_items(
    curves: ErrorCurves, shape: MatrixShape, positions: int, least: float, *, forms: Sequence[str] = ()
) -> list[Item]:
    """The better of columns and low rank at each size of a grid, or each of the given forms; dense included.

    Whole channels stand alone unless more is asked for: what they save in other layers, low rank does not.

    Args:
        curves: of the layer.
        shape: likewise.
        positions: output positions per example.
        least: the smallest budget in stored values.
        forms: these side by side, because they differ in more than their error, in speed for example.
    """
    n, p = shape.n, shape.p
    sizes = [least, *np.maximum(_SIZES * n * p, least)]
    makers = [_MAKERS[form] for form in forms or (("columns", "low_rank") if curves.group_size == 1 else ("columns",))]
    found = [[item for v in sizes if (item := make(curves, v, n, p)) is not None] for make in makers]
    groups = found if forms else [sum(found, [])]
    items = [item for group in groups for item in _falling([item for item in group if item.error < 1])]
    scaled = [replace(item, macs=item.macs * positions) for item in items]
    dense = Item(form="dense", size=p, values=float(n * p), macs=float(n * p * positions), error=0.0)
    return [*scaled, dense]


def _columns(curves: ErrorCurves, values: float, n: int, p: int) -> Item | None:
    k = largest_count(values, n, p, curves.group_size) * curves.group_size
    if k < 1:
        return None
    return Item(
        form="columns",
        size=k,
        values=n * k + index_bits(k, p) / 32,
        macs=float(n * k),
        error=float(curves.columns[k]),
    )


def _rank(curves: ErrorCurves, values: float, n: int, p: int) -> Item | None:
    pivot = ceil(log2(max(2, n))) / 32
    rank = largest_rank(values, n, p, True, pivot)
    if rank < 1 or rank * (n + p) >= n * p:
        return None
    stored = rank * (n + p - rank)
    return Item(
        form="low_rank",
        size=rank,
        values=stored + rank * pivot,
        macs=float(rank * (n + p)),
        error=float(curves.low_rank[rank]),
    )


_MAKERS = {"columns": _columns, "low_rank": _rank}


def _falling(items: list[Item]) -> list[Item]:
    """Without the items that a smaller one beats."""
    kept: list[Item] = []
    for item in sorted(items, key=lambda item: (item.values, item.error)):
        if not kept or item.error < kept[-1].error:
            kept.append(item)
    return kept


def matrix_of(item: Item, curves: ErrorCurves, stats: GramStatistics) -> Float[Array, "n p"]:
    """The fitted matrix of an item."""
    return fit_columns(stats, curves.order, item.size) if item.form == "columns" else fit_rank(stats, item.size)
