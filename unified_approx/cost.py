"""What a network costs: stored values and bits, multiply-adds.

Multiply-adds are counted on the jaxpr of the forward pass, so they are right for every network and execution: each
product or convolution of data with weights counts for the module its weights belong to. A value counts
the bits of its dtype, the indices of kept columns their real width (`solvers.terms`). KB and MB are powers of 10.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree
from rich.table import Table

from solvers.terms import MatrixShape, Term, index_bits
from unified_approx.assemble import get, with_executions
from unified_approx.calling import Call
from unified_approx.layers import Factored, Index
from unified_approx.layers.factored import MERGED
from unified_approx.macs import LayerCall, factored_layers, walk
from unified_approx.sites import Path, path_name

VALUE_BITS = 32  # of a float32 value


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One module that holds weights.

    Attributes:
        path: of the module.
        kind: its class name, for a factored layer with its terms: "FactoredConv(columns+low_rank)".
        params: stored values.
        index_bits: bits of stored indices.
        bits: of values and indices.
        macs: multiply-adds per image with these weights.
        input_shape: of what the first product with them reads, without the batch; None where there is none.
        output_shape: of what comes out of the last one.
    """

    path: Path
    kind: str
    params: int
    index_bits: int
    bits: int
    macs: int
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """A whole network.

    Attributes:
        layers: one row per module with weights; products of data with data count in a row of path ().
        file_bytes: size of the file it was saved to, where there is one.
    """

    layers: tuple[LayerCost, ...]
    file_bytes: int | None = None

    @property
    def params(self) -> int:
        """Stored values."""
        return sum(row.params for row in self.layers)

    @property
    def index_bits(self) -> int:
        """Bits of stored indices."""
        return sum(row.index_bits for row in self.layers)

    @property
    def bits(self) -> int:
        """Bits of values and indices."""
        return sum(row.bits for row in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds per image."""
        return sum(row.macs for row in self.layers)

    def layer(self, path: Path) -> LayerCost:
        """The row of a module; a ValueError when there is none."""
        for row in self.layers:
            if row.path == path:
                return row
        raise ValueError(f"path={path}: no module with weights there; there are {[row.path for row in self.layers]}")


def cost_table(cost: NetworkCost) -> Table:
    """For a terminal: every module with weights, its shapes, and its shares of the whole."""
    table = Table(title=f"{cost.params:,} values, {cost.bits // 8:,} bytes, {cost.macs:,} multiply-adds per image")
    for heading in ("module", "kind", "input", "output", "values", "%", "multiply-adds", "%"):
        table.add_column(heading, justify="left" if heading in ("module", "kind") else "right")
    for row in cost.layers:
        shapes = ("" if s is None else " × ".join(map(str, s)) for s in (row.input_shape, row.output_shape))
        figures = [
            text
            for value, total in ((row.params, cost.params), (row.macs, cost.macs))
            for text in (f"{value:,}", f"{100 * value / max(total, 1):.1f}")
        ]
        table.add_row(path_name(row.path) or "(products of data)", row.kind, *shapes, *figures)
    return table


def params_ratio(original: NetworkCost, compressed: NetworkCost) -> float:
    """Stored values, original / compressed."""
    return original.params / compressed.params


def cr(original: NetworkCost, compressed: NetworkCost) -> float:
    """Compression ratio: bits, indices included, original / compressed."""
    return original.bits / compressed.bits


def macs_ratio(original: NetworkCost, compressed: NetworkCost) -> float:
    """Multiply-adds, original / compressed."""
    return original.macs / compressed.macs


def bytes_ratio(original: NetworkCost, compressed: NetworkCost) -> float:
    """File sizes, original / compressed; a ValueError when either was not saved."""
    if original.file_bytes is None or compressed.file_bytes is None:
        raise ValueError("file_bytes: missing; save both networks and pass their sizes to network_cost")
    return original.file_bytes / compressed.file_bytes


def term_cost(terms: Iterable[Term], shape: MatrixShape) -> tuple[int, int]:
    """Stored values and bits of stored indices of a sum of terms."""
    terms = tuple(terms)
    return sum(t.num_params for t in terms), sum(t.index_bits(shape) for t in terms)


@dataclass(frozen=True)
class BreakEven:
    """The largest structures that still need fewer bits than the dense matrix (32 bits a value, indices included).

    Attributes:
        columns: kept columns.
        rank: of a low-rank pair on all columns, without gauge: r (n + p) values.
        spatial_rank: channels between the two thin convolutions, for a 2-D convolution, else None.
    """

    columns: int
    rank: int
    spatial_rank: int | None


def break_even(shape: MatrixShape) -> BreakEven:
    """From which size on a form stops paying, for a matrix of that shape."""
    n, p = shape.n, shape.p
    dense = VALUE_BITS * n * p
    fits = [k for k in range(p) if VALUE_BITS * n * k + index_bits(k, p) < dense]
    spatial = None
    if len(shape.window) == 2:
        kh, kw = shape.window
        spatial = (n * p - 1) // (kw * shape.c_in + kh * n)
    return BreakEven(max(fits, default=0), (n * p - 1) // (n + p), spatial)


def _batch_size(example: PyTree) -> int:
    for leaf in jax.tree.leaves(example):
        if np.ndim(leaf):
            return int(np.shape(leaf)[0])
    raise ValueError("example: needs an array whose first axis counts the images")


def network_cost(
    model: nnx.Module,
    *example: PyTree,
    call: Call | None = None,
    fold: bool = True,
    file_bytes: int | None = None,
) -> NetworkCost:
    """What a network costs, original or compressed. Nothing is run, only traced.

    Args:
        model: in evaluation mode; not changed.
        *example: the arguments of one call, the images along the first axis.
        call: how the network is called, `call(model, *example)`.
        fold: count every batch normalisation as folded into the layer it follows: nothing, or one bias per channel if
            that layer has none; one that follows no layer directly counts a scale and a shift. Otherwise all its four
            arrays count.
        file_bytes: the size of the network's file, for `bytes_ratio`.

    Raises:
        ValueError: the example holds no array.
    """
    images, walked = _batch_size(example), walk(model, example, call)
    macs, inputs, outputs = Counter[Path](), dict[Path, tuple[int, ...]](), dict[Path, tuple[int, ...]]()
    for c in walked.calls:
        macs[c.path] += c.macs
        inputs.setdefault(c.path, c.input_shape[1:])
        outputs[c.path] = c.output_shape[1:]
    stored: dict[Path, list[Any]] = {}
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(nnx.RngState, Index))))
    for path, leaf in flat:
        stored.setdefault(walked.owner(cast(Path, path)), []).append(leaf)
    rows = []
    for path, leaves in stored.items():
        row = _row(path, get(model, path), leaves, macs.pop(path, 0) // images)
        row = _folded(row, model, walked.follows.get(path)) if fold else row
        rows.append(replace(row, input_shape=inputs.get(path), output_shape=outputs.get(path)))
    rows += [
        LayerCost(path=path, kind="data", params=0, index_bits=0, bits=0, macs=m // images) for path, m in macs.items()
    ]
    return NetworkCost(layers=tuple(rows), file_bytes=file_bytes)


def _row(path: Path, module: Any, leaves: Sequence[Any], macs: int) -> LayerCost:
    kind, indices = type(module).__name__, 0
    if isinstance(module, Factored):
        kind += f"({'+'.join(t.kind for t in module.terms)})"
        indices = sum(t.term().index_bits(module.geometry.matrix_shape) for t in module.terms)
    params = sum(leaf.size for leaf in leaves)
    bits = indices + sum(8 * leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return LayerCost(path=path, kind=kind, params=params, index_bits=indices, bits=bits, macs=macs)


def _folded(row: LayerCost, model: nnx.Module, follows: Path | None) -> LayerCost:
    norm = get(model, row.path)
    if not isinstance(norm, nnx.BatchNorm):
        return row
    kept = 2
    if follows is not None:
        kept = 0 if getattr(get(model, follows), "bias", None) is not None else 1
    params = kept * norm.num_features
    return replace(row, params=params, bits=VALUE_BITS * params)


def layer_calls(model: nnx.Module, *example: PyTree, call: Call | None = None) -> dict[Path, tuple[LayerCall, ...]]:
    """For each module, its products with data in one forward pass: shapes of what it sees, in order.

    Factored layers are traced in their merged form, so that there is one call each time the layer is called.
    """
    merged = with_executions(model, dict.fromkeys(factored_layers(model), MERGED))
    found: dict[Path, list[LayerCall]] = {}
    for c in walk(merged, example, call).calls:
        found.setdefault(c.path, []).append(c)
    return {path: tuple(calls) for path, calls in found.items()}
