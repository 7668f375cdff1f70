"""What a network takes on the clock of this machine, and the executions in which it takes least."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from solvers.terms import Dense
from unified_approx.assemble import homes, modules, put, with_executions
from unified_approx.calling import Call, forward
from unified_approx.cost import layer_calls
from unified_approx.im2col import Geometry, kernel_to_matrix
from unified_approx.layers import Factored, factored_class, geometry_of
from unified_approx.layers.factored import MATMUL, MERGED
from unified_approx.macs import LayerCall, factored_layers
from unified_approx.sites import Path

BATCH = 64  # of the quoted speed-up, and what execution forms are chosen for


def batch_of(example: PyTree, size: int = BATCH) -> PyTree:
    """The first `size` examples, repeated if there are fewer."""
    return jax.tree.map(lambda a: jnp.asarray(np.resize(a[:size], (size, *np.shape(a)[1:]))), example)


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
    # A process has room for 65,530 maps of memory, and networks have many layers and forms.
    _run_module.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
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
    choices = _choices(model, Stopwatch(rounds), layer_calls(model, *example, call=call))
    return with_executions(model, {c.path: c.chosen for c in choices}), choices


def _choices(
    model: nnx.Module, watch: Stopwatch, seen: Mapping[Path, Sequence[LayerCall]]
) -> tuple[ExecutionChoice, ...]:
    """How every factored layer that is called runs fastest."""
    return tuple(
        watch.choose(path, layer, seen[path]) for path, layer in factored_layers(model).items() if path in seen
    )


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
    """The network with its `nnx.Conv`s in the dense forms that are fastest: the baseline to measure a speed-up against.

    XLA's convolution on CPU is tens of times slower than the matrix product on 2x2 images. As in `fastest`, products
    are taken where they gain at least 1, 1.25, 1.6 times, or nowhere, whichever makes the fastest network: the model
    itself is one of them.

    Args:
        model: the original network, in evaluation mode; not changed.
        *example: the arguments of one call.
        call: how the network is called.
        rounds: timed calls of each form, and of each network.

    Returns:
        The network, and what was measured of each layer by itself.
    """
    choices, products = _products(model, Stopwatch(rounds), layer_calls(model, *example, call=call))
    gains = {c.path: c.seconds[MERGED] / c.seconds[MATMUL] for c in choices}
    chosen = [{path: products[path] for path, gained in gains.items() if gained >= gain} for gain in _GAINS]
    networks = [_with_layers(model, layers) for i, layers in enumerate(chosen) if layers not in chosen[:i]]
    return _fastest_of(networks, *example, call=call, rounds=rounds), choices


def _products(
    model: nnx.Module, watch: Stopwatch, seen: Mapping[Path, Sequence[LayerCall]]
) -> tuple[tuple[ExecutionChoice, ...], dict[Path, Factored]]:
    """What was measured of every `nnx.Conv` that `geometry_of` takes, and each as a product of patches and matrix."""
    choices, products = [], {}
    for path, conv in modules(model).items():
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
        products[path] = type(layer)(list(layer.terms), layer.bias, geometry, MATMUL, conv.dtype)
    return tuple(choices), products


def _with_layers(model: nnx.Module, layers: Mapping[Path, Factored]) -> nnx.Module:
    clone = nnx.clone(model)
    for path, layer in layers.items():
        for home in homes(clone, path):
            clone = put(clone, home, layer)
    return clone


FASTEST = "fastest"
"""In place of an execution's name: what `fastest` finds."""
_GAINS = (1.0, 1.25, 1.6, inf)


def fastest(model: nnx.Module, *example: PyTree, call: Call | None = None, rounds: int = 10) -> nnx.Module:
    """A compressed network as fast as it runs here.

    Layers that were left dense take the faster dense form, as the baseline does. A layer that is faster alone may slow
    the network down, because operations beside it are no longer fused with it; so factored forms are kept where they
    gain at least 1, 1.25, 1.6 times, or nowhere, and of these networks, and that of dense convolutions alone, the
    fastest is taken.

    Args:
        model: in evaluation mode; not changed.
        *example: the arguments of one call.
        call: how the network is called.
        rounds: timed calls of each form, and of each network.
    """
    watch, seen = Stopwatch(rounds), layer_calls(model, *example, call=call)
    dense, products = _products(model, watch, seen)
    tuned = _with_layers(model, {c.path: products[c.path] for c in dense if c.chosen == MATMUL})
    choices = _choices(tuned, watch, seen)
    forms = [{c.path: _with_gain(c, gain) for c in choices} for gain in _GAINS]
    forms.append({c.path: MERGED for c in choices})
    networks = [with_executions(tuned, own) for i, own in enumerate(forms) if own not in forms[:i]]
    return _fastest_of(networks, *example, call=call, rounds=rounds)


def _fastest_of(networks: Sequence[nnx.Module], *example: PyTree, call: Call | None, rounds: int) -> nnx.Module:
    """By interleaved runs."""
    if len(networks) == 1:
        return networks[0]
    times = measure_latency({str(i): new for i, new in enumerate(networks)}, *example, call=call, rounds=rounds)
    return networks[min(range(len(networks)), key=lambda i: times[str(i)])]


def beside_fastest_dense(
    original: nnx.Module, compressed: nnx.Module, *example: PyTree, call: Call | None = None, rounds: int = 20
) -> dict[str, float]:
    """Median seconds per call of "original", in its fastest dense form, and "compressed", interleaved (A B A B).

    Args:
        original: in evaluation mode.
        compressed: likewise, its executions chosen.
        *example: the arguments of one call.
        call: how the networks are called.
        rounds: timed calls of each.
    """
    dense, _ = fastest_dense(original, *example, call=call, rounds=max(1, rounds // 2))
    return measure_latency({"original": dense, "compressed": compressed}, *example, call=call, rounds=rounds)


def _with_gain(choice: ExecutionChoice, gain: float) -> str:
    """The chosen form if it is so much faster than the better dense form, else that."""
    dense = min((name for name in (MERGED, MATMUL) if name in choice.seconds), key=lambda name: choice.seconds[name])
    return choice.chosen if choice.seconds[dense] >= gain * choice.seconds[choice.chosen] else dense
