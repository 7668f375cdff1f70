"""Output channels that nothing reads are taken out of the layer that makes them.

A compressed layer reads only some of its input channels. What no layer reads, and nothing else sees, need not be
computed: its row goes from the producer's terms and bias and from its batch norm, its column number from the readers.
Without a row a producer may itself read less, so layers are looked at from the last to the first.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, PyTree

from unified_approx import calibration
from unified_approx.assemble import get, homes, modules, put
from unified_approx.calling import Call, forward
from unified_approx.channels import UNKNOWN, ChannelFlow, Numbers, channel_flow
from unified_approx.discover import find_layers
from unified_approx.evaluate import outputs_once
from unified_approx.graph import trace
from unified_approx.narrow import Layer, as_dense, narrow_layer, narrow_norm, shape_of, terms_of
from unified_approx.sites import Path, path_name

Alive = Bool[np.ndarray, " channels"]
_EXAMPLES = 16
_TOLERANCE = 1e-3  # of the largest output: sums in another order, on accelerators in TF32
_TOLERANCE_SMALL_DTYPES = 3e-2


def remove_unread(model: nnx.Module, example: PyTree, call: Call = forward) -> tuple[nnx.Module, dict[str, int]]:
    """The network without the output channels that nothing reads: the same function, to rounding.

    A channel goes when every layer that it reaches, through elementwise operations, batch norms, pooling, means over
    the image and flattening, has only zeros for it. Channels that reach anything else stay: additions of branches,
    concatenations, grouped convolutions, the network's outputs, operations that are not known. The new network is run
    on the example; a layer whose change alters the outputs, or that the network's code does not allow, is left alone.

    Args:
        model: compressed or not; it is not changed. Batch norm must use its running statistics.
        example: one batch as `call` takes it, the examples along the first axis.
        call: how the network is called, `call(model, batch)`.

    Returns:
        The new network, `model` itself if there is nothing to remove; and for each layer that lost output channels,
        by name, how many. A dense layer becomes a factored one with a single dense term where its shape changes.

    Raises:
        ValueError: no examples, or a batch norm that runs in training mode.
    """
    few = jax.tree.map(lambda a: a[:_EXAMPLES], example)
    flow = _flow(model, few, call)
    layers: dict[Path, Layer] = {path: get(model, path) for path in flow.outputs}
    for path, layer in layers.items():
        if getattr(layer, "mask", None) is not None:  # of all ones, which no factored layer has
            flow.pin(flow.outputs[path])
            flow.pin(flow.inputs[path])
    alive = _alive(flow, layers, flow.outputs)
    shrinking = [path for path, own in flow.outputs.items() if not alive[own].all()]
    if not shrinking:
        return model, {}
    before = outputs_once(model, few, call=call)
    new = _checked(model, flow, alive, before, few, call)
    if new is None:
        new, alive = _one_by_one(model, flow, layers, shrinking[::-1], before, few, call)
    counts = {path_name(path): int(np.sum(~alive[flow.outputs[path]])) for path in shrinking}
    return new, {name: count for name, count in counts.items() if count}


def _flow(model: nnx.Module, example: PyTree, call: Call) -> ChannelFlow:
    """The channels of the network, in whatever forms its layers run."""
    plain = as_dense(model)
    plain.eval()
    graph = trace(plain, (example,), call)
    return channel_flow(graph, plain, find_layers(graph, plain, calibration.count(example))[0])


def _alive(flow: ChannelFlow, layers: Mapping[Path, Layer], shrinking: Collection[Path]) -> Alive:
    """By number which channels stay, if only the layers `shrinking` may lose any."""
    alive = flow.pinned.copy()
    for path, own in list(flow.outputs.items())[::-1]:
        if path not in shrinking:
            alive[own] = True
        elif not alive[own].any():
            alive[own[0]] = True  # a layer has one channel at least
        rows, shape = np.flatnonzero(alive[own]), shape_of(layers[path])
        read = np.zeros(shape.c_in, bool)
        for term in terms_of(layers[path]):
            read |= term.with_rows(rows).channels_read(shape)
        seen = flow.inputs[path][read]
        alive[seen[seen != UNKNOWN]] = True
    return alive


def _stays(numbers: Numbers, alive: Alive) -> Bool[np.ndarray, "..."]:
    return (numbers == UNKNOWN) | alive[numbers]


def _narrowed(model: nnx.Module, flow: ChannelFlow, alive: Alive) -> nnx.Module:
    """A copy of the network with the channels that stay."""
    changes: list[tuple[Path, nnx.Module]] = []
    for path, own in flow.outputs.items():
        rows, channels = alive[own], _stays(flow.inputs[path], alive)
        if not (rows.all() and channels.all()):
            changes.append((path, narrow_layer(get(model, path), np.flatnonzero(rows), np.flatnonzero(channels))))
    for path, numbers in flow.norms.items():
        kept = _stays(numbers, alive)
        if not kept.all():
            changes.append((path, narrow_norm(get(model, path), np.flatnonzero(kept))))
    clone = nnx.clone(model)
    for path, module in changes:
        for home in homes(model, path):
            clone = put(clone, home, module)
    return clone


def _checked(
    model: nnx.Module,
    flow: ChannelFlow,
    alive: Alive,
    before: Sequence[Any],
    example: PyTree,
    call: Call,
) -> nnx.Module | None:
    """The narrowed network if it runs and gives the outputs `before`, else None."""
    new = _narrowed(model, flow, alive)
    try:
        after = outputs_once(new, example, call=call)
    except Exception:  # noqa: BLE001 (the network's own code meets numbers of channels that it may not expect)
        return None
    tolerance = _tolerance(model)
    return new if all(_close(one, other, tolerance) for one, other in zip(before, after, strict=True)) else None


def _tolerance(model: nnx.Module) -> float:
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))}
    computed = (getattr(module, "dtype", None) for module in modules(model).values())
    dtypes |= {jnp.dtype(dtype) for dtype in computed if dtype is not None}
    small = any(jnp.issubdtype(d, jnp.floating) and jnp.finfo(d).bits < 32 for d in dtypes)
    return _TOLERANCE_SMALL_DTYPES if small else _TOLERANCE


def _close(one: Any, other: Any, tolerance: float) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.size or not jnp.issubdtype(one.dtype, jnp.inexact):
        return np.array_equal(one, other)
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(np.max(np.abs(one - other))) <= tolerance * float(np.max(np.abs(one)))


def _one_by_one(
    model: nnx.Module,
    flow: ChannelFlow,
    layers: Mapping[Path, Layer],
    shrinking: Sequence[Path],
    before: Sequence[Any],
    example: PyTree,
    call: Call,
) -> tuple[nnx.Module, Alive]:
    """The network with every layer narrowed that can be, tried in the given order, and the channels that stay."""
    found, alive, allowed = model, np.ones_like(flow.pinned), []
    for path in shrinking:
        trial = _alive(flow, layers, [*allowed, path])
        new = _checked(model, flow, trial, before, example, call)
        if new is not None:
            found, alive = new, trial
            allowed.append(path)
    return found, alive
