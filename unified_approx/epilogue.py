"""What follows a layer: scale and shift (own bias, batch norm, in any spelling), offsets, the activation.

Everything is found by walking forward from the layer's output and judged by value, not by name. Stopping early is
always valid: the layer is then only reproduced at an earlier point.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from solvers.activation import IDENTITY, NAMED, RELU, Activation
from unified_approx.graph import Graph, Op
from unified_approx.sites import Path

_RESHAPES = ("reshape", "squeeze", "expand_dims")
_CLIPS = ("max", "min", "clamp")
ELEMENTWISE = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type cos cosh div eq erf erf_inv erfc exp exp2 expm1
    floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow reduce_precision rem
    round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor
""".split()  # noqa: SIM905
_COMMUTE_WITH_RELU = """
    broadcast_in_dim concatenate convert_element_type expand_dims pad reduce_max reduce_window_max reshape rev slice
    squeeze transpose
""".split()  # noqa: SIM905


@dataclass(frozen=True, eq=False)
class AffineStep:
    """One operation after the layer: value `output` = scale * value before + shift, per channel, in float64.

    `origins` are the Variables that scale and shift were computed from, `op` the operation's position.
    """

    op: int
    output: int
    scale: Float[np.ndarray, " n"]
    shift: Float[np.ndarray, " n"]
    origins: frozenset[Path]


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What follows one call of a layer.

    Attributes:
        output: number of the layer's own output.
        steps: from there to z.
        z: number of the value that the layer's replacement has to produce.
        offsets: numbers and signs of the values added to z.
        h: number of the response: z plus the offsets.
        activation: of h.
    """

    output: int
    steps: tuple[AffineStep, ...]
    z: int
    offsets: tuple[tuple[int, int], ...]
    h: int
    activation: Activation

    def cut(self, num_steps: int) -> "Epilogue":
        """The epilogue that stops after the first steps, without offset and activation."""
        z = self.steps[num_steps - 1].output if num_steps else self.output
        return replace(self, steps=self.steps[:num_steps], z=z, offsets=(), h=z, activation=IDENTITY)


def compose(steps: Sequence[AffineStep], channels: int) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Scale and shift of several steps, one after the other."""
    scale, shift = np.ones(channels), np.zeros(channels)
    for step in steps:
        scale, shift = scale * step.scale, shift * step.scale + step.shift
    return scale, shift


def follow(graph: Graph, output: int, known: list[Activation]) -> Epilogue:
    """The epilogue of the layer whose output is the value `output`, channels on its last axis.

    `known` are the activations met so far; a new one is appended, an old one reused, so that layers with the same
    activation share one compilation of their solves.
    """
    channels = graph.avals[output].shape[-1]
    steps, z = [], output
    while (index := _sole_consumer(graph, z)) is not None:
        if _keeps_rows(graph, graph.ops[index]):
            z = graph.ops[index].outputs[0]
        elif (step := _affine_step(graph, index, z, channels)) is not None:
            steps.append(step)
            z = step.output
        else:
            break
    offsets, h = [], z
    while (index := _sole_consumer(graph, h)) is not None:
        op = graph.ops[index]
        if (offset := _offset(graph, op, h)) is not None:
            offsets.append(offset)
        elif not _keeps_rows(graph, op):
            break
        h = op.outputs[0]
    activation = find_activation(graph, h, known)
    if activation is None:
        activation = RELU if _relu_further_on(graph, h) else IDENTITY
    return Epilogue(output, tuple(steps), z, tuple(offsets), h, activation)


def _sole_consumer(graph: Graph, number: int) -> int | None:
    consumers = graph.consumers.get(number, [])
    if number in graph.outputs or len(consumers) != 1 or graph.ops[consumers[0]].inputs.count(number) != 1:
        return None
    return consumers[0]


def _keeps_rows(graph: Graph, op: Op) -> bool:
    """Whether the op keeps all values in row-major order with the channels on the last axis."""
    before, after = graph.avals[op.inputs[0]], graph.avals[op.outputs[0]]
    if op.name == "convert_element_type":
        return jnp.issubdtype(after.dtype, jnp.floating)
    return op.name in _RESHAPES and before.shape[-1:] == after.shape[-1:]


def _affine_step(graph: Graph, index: int, number: int, channels: int) -> AffineStep | None:
    op, one, zero = graph.ops[index], np.ones(channels), np.zeros(channels)
    if op.name == "neg":
        return AffineStep(index, op.outputs[0], -one, zero, frozenset())
    if op.name not in ("add", "add_any", "sub", "mul", "div") or len(op.inputs) != 2:
        return None
    first = op.inputs[0] == number
    other = op.inputs[1] if first else op.inputs[0]
    value = graph.per_channel(other, channels) if graph.is_constant(other) else None
    if value is None or (op.name == "div" and (not first or (value == 0).any())):
        return None
    if op.name == "mul":
        scale, shift = value, zero
    elif op.name == "div":
        scale, shift = one / value, zero
    elif op.name == "sub":
        scale, shift = (one, -value) if first else (-one, value)
    else:
        scale, shift = one, value
    return AffineStep(index, op.outputs[0], scale, shift, graph.origins[other])


def _offset(graph: Graph, op: Op, h: int) -> tuple[int, int] | None:
    if op.name not in ("add", "add_any", "sub") or (op.name == "sub" and op.inputs[0] != h):
        return None
    other = op.inputs[1] if op.inputs[0] == h else op.inputs[0]
    same_shape = graph.avals[other].shape == graph.avals[h].shape
    return (other, -1 if op.name == "sub" else 1) if same_shape else None


class _Region:
    """Elementwise ops fed by the value h alone, grown until a single value leads out of it."""

    def __init__(self, graph: Graph, h: int):
        self.graph, self.h = graph, h
        self.ops: list[int] = []
        self.values = {h}

    def open_values(self) -> set[int]:
        """The values that something outside reads."""
        graph, ops = self.graph, set(self.ops)
        return {v for v in self.values if v in graph.outputs or not ops.issuperset(graph.consumers.get(v, ()))}

    def exit(self) -> int | None:
        """The one value that leads out, if it is one, and a floating-point one."""
        leading = self.open_values()
        if not self.ops or len(leading) != 1 or self.h in leading:
            return None
        (number,) = leading
        return number if jnp.issubdtype(self.graph.avals[number].dtype, jnp.floating) else None

    def grow(self, only: Sequence[str] = ()) -> bool:
        """Absorb the earliest reader, if it is elementwise (and among `only`, if given)."""
        graph, ops = self.graph, set(self.ops)
        readers = [i for v in self.open_values() for i in graph.consumers.get(v, ()) if i not in ops]
        if not readers or (only and len(readers) > 1):
            return False
        op = graph.ops[min(readers)]
        shape = graph.avals[self.h].shape
        fits = op.name in (only or ELEMENTWISE) and all(graph.avals[v].shape == shape for v in op.outputs)
        if not fits or not all(v in self.values or self._scalar(v) is not None for v in op.inputs):
            return False
        self.ops.append(min(readers))
        self.values.update(op.outputs)
        return True

    def _scalar(self, number: int) -> np.generic | None:
        return self.graph.scalar(number) if self.graph.is_constant(number) else None

    def activation(self, name: str, result: int) -> Activation:
        """The region as a function of h."""
        graph, h = self.graph, self.h
        ops = [graph.ops[i] for i in self.ops]
        inputs = {v for op in ops for v in op.inputs}.difference(self.values)
        scalars = {v: jnp.asarray(graph.scalar(v), graph.avals[v].dtype) for v in inputs}
        dtype = graph.avals[h].dtype

        def function(z: Float[Array, "..."]) -> Float[Array, "..."]:
            values = {v: jnp.broadcast_to(s, z.shape) for v, s in scalars.items()}
            values[h] = z.astype(dtype)
            for op in ops:
                values.update(zip(op.outputs, op.function(*(values[v] for v in op.inputs)), strict=True))
            return values[result].astype(z.dtype)

        return Activation(name, function)


def find_activation(graph: Graph, h: int, known: list[Activation]) -> Activation | None:
    """The elementwise function that h goes through before anything else happens to it, or None.

    The smallest region with a single exit that is not affine; clips that follow it belong to it (relu6 is a relu,
    then a minimum). A positive multiple of the relu counts as the relu.
    """
    region, found = _Region(graph, h), None
    while found is None and h not in graph.outputs and region.grow():
        if (number := region.exit()) is not None:
            found = _recognise(region, number, known)
    while found is not None and region.grow(only=_CLIPS):
        if (number := region.exit()) is not None:
            found = _recognise(region, number, known) or found
    if found is not None and found not in known:
        known.append(found)
    return found


def _recognise(region: _Region, number: int, known: Sequence[Activation]) -> Activation | None:
    """The region as an activation, a known one if their values agree; None if it is affine."""
    dtype = region.graph.avals[region.h].dtype
    names = dict.fromkeys(region.graph.ops[i].name for i in region.ops)
    candidate = region.activation("_".join(n for n in names if n != "convert_element_type"), number)
    # Both signs and beyond 6; a fixed seed: the same network is always read the same way.
    points = jnp.asarray(4.0 * np.random.default_rng(0).standard_normal(512), dtype)
    tolerance = 1e-5 if jnp.finfo(dtype).bits >= 32 else 2e-2

    def agrees(one: np.ndarray, other: np.ndarray) -> bool:
        return np.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)

    t, value = np.asarray(points, np.float64), np.asarray(candidate(points), np.float64)
    if np.isfinite(value).all():
        slope, intercept = np.polyfit(t, value, 1)
        if agrees(slope * t + intercept, value):
            return None
        top = value[t.argmax()] / t.max()
        if top > 0 and agrees(top * np.maximum(t, 0), value):
            return RELU
    for activation in [*NAMED.values(), *known]:
        if agrees(np.asarray(activation(points), np.float64), value):
            return activation
    return candidate


def _relu_further_on(graph: Graph, h: int) -> bool:
    """Whether every path from h reaches a relu through operations that commute with it."""
    consumers = graph.consumers.get(h, [])
    if h in graph.outputs or not consumers:
        return False
    if find_activation(graph, h, []) is RELU:
        return True
    for index in consumers:
        op = graph.ops[index]
        commutes = op.name in _COMMUTE_WITH_RELU and (op.name != "pad" or _pads_with_zero(graph, op))
        if not commutes or not _relu_further_on(graph, op.outputs[0]):
            return False
    return True


def _pads_with_zero(graph: Graph, op: Op) -> bool:
    return graph.is_constant(op.inputs[1]) and bool(graph.scalar(op.inputs[1]) == 0)
