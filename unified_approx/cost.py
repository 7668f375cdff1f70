"""What a network costs: stored values and bits, multiply-adds, time on this machine; and the execution that is fastest.

Multiply-adds are counted on the jaxpr of the forward pass, so they are right for every network and execution: each
product or convolution of data with weights counts for the module its weights belong to. A value counts
the bits of its dtype, the indices of kept columns their real width (`solvers.terms`). KB and MB are powers of 10.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from statistics import median
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from solvers.terms import Dense, MatrixShape, Term, index_bits
from unified_approx.assemble import get, homes, modules, put
from unified_approx.calling import Call, forward
from unified_approx.im2col import Geometry, kernel_to_matrix
from unified_approx.layers import Factored, Index, factored_class, geometry_of
from unified_approx.layers.factored import MATMUL, MERGED
from unified_approx.macs import LayerCall, factored_layers, walk
from unified_approx.sites import Path

VALUE_BITS = 32  # of a float32 value
BATCH = 64  # of the quoted speed-up, and what execution forms are chosen for


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
    """

    path: Path
    kind: str
    params: int
    index_bits: int
    bits: int
    macs: int


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


def batch_of(example: PyTree, size: int = BATCH) -> PyTree:
    """The first `size` examples, repeated if there are fewer."""
    return jax.tree.map(lambda a: jnp.asarray(np.resize(a[:size], (size, *np.shape(a)[1:]))), example)


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
    macs = Counter[Path]()
    for c in walked.calls:
        macs[c.path] += c.macs
    stored: dict[Path, list[Any]] = {}
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(nnx.RngState, Index))))
    for path, leaf in flat:
        stored.setdefault(walked.owner(cast(Path, path)), []).append(leaf)
    rows = []
    for path, leaves in stored.items():
        row = _row(path, get(model, path), leaves, macs.pop(path, 0) // images)
        rows.append(_folded(row, model, walked.follows.get(path)) if fold else row)
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


def with_executions(model: nnx.Module, executions: Mapping[Path, str]) -> nnx.Module:
    """A copy of the network with factored layers, by path, run in the given forms. Variables are copies too."""
    clone = nnx.clone(model)
    for path, name in executions.items():
        layer = get(clone, path).with_execution(name)
        for home in homes(clone, path):
            clone = put(clone, home, layer)
    return clone


@partial(jax.jit, static_argnums=(0, 1))
def _run_module(call: Call, graphdef: Any, state: Any, *inputs: Any) -> Any:
    return call(nnx.merge(graphdef, state), *inputs)


def measure_latency(
    candidates: Mapping[str, nnx.Module | Callable[..., Any]],
    *inputs: PyTree,
    call: Call | None = None,
    rounds: int = 20,
) -> dict[str, float]:
    """Median seconds per call of each candidate, on this machine, with these inputs.

    Rounds are interleaved, A B C A B C ..., so that a slow moment of the machine hits all alike: quote ratios. Each
    candidate is compiled and run once beforehand, and every call is waited for.

    Args:
        candidates: modules in evaluation mode, or functions of the inputs; both are jitted.
        *inputs: arguments of every call.
        call: how modules are called, `call(module, *inputs)`.
        rounds: calls of each.

    Raises:
        ValueError: no candidates, or rounds < 1.
    """
    if not candidates or rounds < 1:
        raise ValueError(f"candidates={list(candidates)}, rounds={rounds}: give at least one of each")
    calls = {}
    for name, candidate in candidates.items():
        module = isinstance(candidate, nnx.Module)
        calls[name] = partial(_run_module, call or forward, *nnx.split(candidate)) if module else jax.jit(candidate)
        jax.block_until_ready(calls[name](*inputs))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, run in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


@dataclass(frozen=True, kw_only=True)
class ExecutionChoice:
    """How one layer's forms compare on this machine.

    Attributes:
        path: of the layer.
        seconds: per form, for all calls of the layer in one forward pass.
        chosen: the fastest.
    """

    path: Path
    seconds: dict[str, float]
    chosen: str


class Stopwatch:
    """Measures layers form by form; equal layers on equal inputs once."""

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.known: dict[Any, dict[str, float]] = {}

    def choose(self, path: Path, layer: Factored, calls: Iterable[LayerCall]) -> ExecutionChoice:
        """Seconds of every execution of a layer, all its calls together, and the fastest."""
        forms = {name: layer.with_execution(name) for name in layer.executions()}
        structure = (nnx.graphdef(layer.with_execution(MERGED)), _shapes(layer))
        total = dict.fromkeys(forms, 0.0)
        for c in calls:
            key = (structure, c.input_shape, c.input_dtype)
            if key not in self.known:
                x = np.random.default_rng(0).standard_normal(c.input_shape)
                self.known[key] = measure_latency(forms, jnp.asarray(x, c.input_dtype), rounds=self.rounds)
            total = {name: total[name] + self.known[key][name] for name in forms}
        return ExecutionChoice(path=path, seconds=total, chosen=min(total, key=lambda name: total[name]))


def _shapes(module: nnx.Module) -> tuple[Any, ...]:
    return tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(nnx.state(module)))


def choose_executions(
    model: nnx.Module, *example: PyTree, call: Call | None = None, rounds: int = 10
) -> tuple[nnx.Module, tuple[ExecutionChoice, ...]]:
    """The network with every factored layer in the form that is fastest on this machine, and what was measured.

    Each layer is measured by itself on random input of the shape that it sees when the network is called on `example`,
    whose batch size therefore matters. Layers that the call never reaches stay as they are.

    Args:
        model: in evaluation mode; not changed.
        *example: the arguments of one call.
        call: how the network is called.
        rounds: timed calls of every form.
    """
    seen, watch = layer_calls(model, *example, call=call), Stopwatch(rounds)
    choices = tuple(
        watch.choose(path, layer, seen[path]) for path, layer in factored_layers(model).items() if path in seen
    )
    return with_executions(model, {c.path: c.chosen for c in choices}), choices


def fastest_dense_form(
    geometry: Geometry, x_shape: Sequence[int], *, dtype: str = "float32", rounds: int = 10
) -> ExecutionChoice:
    """Which dense form of a layer is faster here: the convolution ("merged") or sliced patches times matrix ("matmul").

    Args:
        geometry: of the layer.
        x_shape: (batch, *spatial, c_in).
        dtype: of input and weights.
        rounds: timed calls of each.
    """
    layer = _dense_layer(np.zeros((geometry.c_out, geometry.matrix_shape.p), np.float32), None, geometry, dtype)
    return Stopwatch(rounds).choose((), layer, [LayerCall((), 0, tuple(x_shape), dtype)])


def _dense_layer(matrix: np.ndarray, bias: np.ndarray | None, geometry: Geometry, param_dtype: str) -> Factored:
    return factored_class(geometry).from_terms([Dense(matrix)], bias, geometry, param_dtype=param_dtype)


def fastest_dense(
    model: nnx.Module, *example: PyTree, call: Call | None = None, rounds: int = 10
) -> tuple[nnx.Module, tuple[ExecutionChoice, ...]]:
    """The network with every `nnx.Conv` in its faster dense form: the baseline to measure a speed-up against.

    XLA's convolution on CPU is tens of times slower than the matrix product on 2x2 images. Layers whose convolution is
    the faster form stay as they are, as do those that `geometry_of` refuses.

    Args:
        model: the original network, in evaluation mode; not changed.
        *example: the arguments of one call.
        call: how the network is called.
        rounds: timed calls of each form.
    """
    seen, watch = layer_calls(model, *example, call=call), Stopwatch(rounds)
    clone, choices = nnx.clone(model), []
    for path, conv in modules(clone).items():
        if type(conv) is not nnx.Conv or path not in seen:
            continue
        try:
            geometry = geometry_of(conv)
        except ValueError:
            continue
        bias = None if conv.bias is None else np.asarray(conv.bias[...], np.float32)
        matrix = np.asarray(kernel_to_matrix(conv.kernel[...]), np.float32)
        layer = _dense_layer(matrix, bias, geometry, conv.kernel.dtype.name)
        choices.append(watch.choose(path, layer, seen[path]))
        if choices[-1].chosen == MATMUL:
            fast = type(layer)(list(layer.terms), layer.bias, geometry, MATMUL, conv.dtype)
            for home in homes(clone, path):
                clone = put(clone, home, fast)
    return clone, tuple(choices)


_GAINS = (1.0, 1.25, 1.6, inf)


def fastest(model: nnx.Module, *example: PyTree, call: Call | None = None, rounds: int = 10) -> nnx.Module:
    """A compressed network as fast as it runs here.

    Layers that were left dense take the faster dense form, as the baseline does. A layer that is faster alone may slow
    the network down, because operations beside it are no longer fused with it; so factored forms are kept where they
    gain at least 1, 1.25, 1.6 times, or nowhere, and of these networks the fastest is taken.

    Args:
        model: in evaluation mode; not changed.
        *example: the arguments of one call.
        call: how the network is called.
        rounds: timed calls of each form, and of each network.
    """
    dense, _ = fastest_dense(model, *example, call=call, rounds=rounds)
    tuned, choices = choose_executions(dense, *example, call=call, rounds=rounds)
    forms = [{c.path: _with_gain(c, gain) for c in choices} for gain in _GAINS]
    networks = {i: with_executions(tuned, own) for i, own in enumerate(forms) if own not in forms[:i]}
    times = measure_latency({str(i): new for i, new in networks.items()}, *example, call=call, rounds=rounds)
    return networks[min(networks, key=lambda i: times[str(i)])]


def _with_gain(choice: ExecutionChoice, gain: float) -> str:
    """The chosen form if it is so much faster than the better dense form, else that."""
    dense = min((name for name in (MERGED, MATMUL) if name in choice.seconds), key=lambda name: choice.seconds[name])
    return choice.chosen if choice.seconds[dense] >= gain * choice.seconds[choice.chosen] else dense
