"""The forward pass of a network as one flat list of operations, read off its jaxpr.

The state of the network enters as arguments, so every operand is known by the path of the Variable it came from:
a convolution *is* `("blocks", 0, "conv1")` because its right operand came from `("blocks", 0, "conv1", "kernel")`.
Nested calls (jit, remat, custom derivatives) are inlined; what the outputs do not need is dropped; what depends on
weights only is evaluated once. The rest can be run piecewise (`unified_approx.execution`).

Values are numbered; number -> shape and dtype in `Graph.avals`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend import core as jex_core
from jaxtyping import Shaped

from unified_approx.assemble import get, modules
from unified_approx.sites import Path
from unified_approx.tiny import by_patches, tiny_convolution

# Primitives that only call another jaxpr, and the parameter that holds it; releases differ in the names.
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_ALIASES = ("name", "copy", "copy_p")
_LAZY_SIZE = 4096  # weight-only broadcasts with more elements are made when read, not stored

Value = Any  # a jax.Array, or a NumPy or Python scalar as literals have it


@dataclass(frozen=True, eq=False)
class Op:
    """One operation: `outputs = function(*inputs)`, values given by their numbers."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    function: Callable[..., Sequence[Value]]

    @property
    def is_loop(self) -> bool:
        """Whether it runs a program of its own: a loop, a branch."""
        leaves = jax.tree.leaves(dict(self.params))
        return any(isinstance(p, (jex_core.Jaxpr, jex_core.ClosedJaxpr)) for p in leaves)


@dataclass(eq=False)
class Graph:
    """A forward pass.

    Attributes:
        ops: the operations that depend on the data, in execution order.
        avals: shape and dtype of every value.
        inputs: numbers of the data arguments' leaves.
        outputs: numbers of the outputs' leaves.
        out_tree: how the outputs are nested.
        origins: for each value that does not depend on the data, the paths of the Variables it was computed from.
        leaf_paths: the path of every state leaf.
        constants: the values that do not depend on the data, other than large broadcasts.
        broadcasts: large broadcasts of such values, by output number: evaluated at each reading.
    """

    ops: list[Op]
    avals: list[Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    out_tree: Any
    origins: dict[int, frozenset[Path]]
    leaf_paths: frozenset[Path]
    constants: dict[int, Value]
    broadcasts: dict[int, Op]
    producer: dict[int, int] = field(init=False)
    consumers: dict[int, list[int]] = field(init=False)

    def __post_init__(self):
        self.producer = {v: i for i, op in enumerate(self.ops) for v in op.outputs}
        self.consumers = {}
        for i, op in enumerate(self.ops):
            for v in dict.fromkeys(op.inputs):
                self.consumers.setdefault(v, []).append(i)

    def is_constant(self, number: int) -> bool:
        """Whether the value does not depend on the data."""
        return number in self.origins

    def constant(self, number: int) -> Value:
        """A value that does not depend on the data."""
        if number in self.constants:
            return self.constants[number]
        op = self.broadcasts[number]
        return op.function(*(self.constant(v) for v in op.inputs))[0]

    def per_channel(self, number: int, channels: int) -> Shaped[np.ndarray, " n"] | None:
        """A weight-only operand as one float64 value per channel of the last axis; None if it is not of that kind."""
        op = self.broadcasts.get(number)
        if op is not None and op.name == "broadcast_in_dim":
            small, axes = np.asarray(self.constant(op.inputs[0])), op.params["broadcast_dimensions"]
            last = small.shape[-1] if axes and axes[-1] == len(self.avals[number].shape) - 1 else 1
            if small.size == last:  # all other axes have size 1: no need to write the broadcast out
                return np.broadcast_to(small.astype(np.float64).reshape(-1), (channels,))
        value = np.asarray(self.constant(number)).astype(np.float64)
        if value.ndim == 0:
            return np.broadcast_to(value, (channels,))
        if value.shape[-1] not in (1, channels):
            return None
        rows = value.reshape(-1, value.shape[-1])
        return np.broadcast_to(rows[0], (channels,)) if (rows == rows[0]).all() else None

    def scalar(self, number: int) -> Value | None:
        """A weight-only operand as the one value all its elements have (as a NumPy scalar), or None."""
        op = self.broadcasts.get(number)
        value = np.asarray(self.constant(number if op is None or op.name != "broadcast_in_dim" else op.inputs[0]))
        if value.size == 0 or not (value == value.flat[0]).all():
            return None
        return value.reshape(-1)[0]


class _Flattener:
    """Writes a jaxpr and all it calls into one list of ops with fresh numbers."""

    def __init__(self):
        self.ops: list[Op] = []
        self.avals: list[Any] = []
        self.literals: dict[int, Value] = {}

    def new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def literal(self, value: Value, aval: Any) -> int:
        number = self.new(aval)
        self.literals[number] = value
        return number

    def run(self, jaxpr: Any, consts: Iterable[Value], args: Sequence[int]) -> list[int]:
        # Equal calls share one jaxpr and its Var objects, so each inlining gets its own environment.
        numbers = [self.literal(c, v.aval) for v, c in zip(jaxpr.constvars, consts, strict=True)]
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*numbers, *args], strict=True))

        def read(atom: Any) -> int:
            return self.literal(atom.val, atom.aval) if isinstance(atom, jex_core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            name, inputs = eqn.primitive.name, [read(a) for a in eqn.invars]
            if name in _INLINED:
                inner = eqn.params[_INLINED[name]]
                closed = isinstance(inner, jex_core.ClosedJaxpr)
                outputs = self.run(*((inner.jaxpr, inner.consts) if closed else (inner, ())), inputs)
            elif name in _ALIASES:
                outputs = inputs
            else:
                outputs = [self.new(v.aval) for v in eqn.outvars]
                self.ops.append(Op(name, tuple(inputs), tuple(outputs), eqn.params, _function(eqn)))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(a) for a in jaxpr.outvars]


def _function(eqn: Any) -> Callable[..., Sequence[Value]]:
    primitive, params = eqn.primitive, eqn.params
    geometry = tiny_convolution(eqn)
    if geometry is not None:
        dtype = eqn.outvars[0].aval.dtype
        return lambda x, kernel: [by_patches(x, kernel, geometry).astype(dtype)]

    def run(*values: Value) -> Sequence[Value]:
        out = primitive.bind(*values, **params)
        return out if primitive.multiple_results else [out]

    return run


def _drop_dead(ops: Iterable[Op], outputs: Iterable[int]) -> list[Op]:
    needed, live = set(outputs), []
    for op in reversed(list(ops)):
        if needed.intersection(op.outputs):
            needed.update(op.inputs)
            live.append(op)
    return live[::-1]


def _fold_constants(
    ops: Iterable[Op], avals: Sequence[Any], constants: dict[int, Value], origins: dict[int, frozenset[Path]]
) -> tuple[list[Op], dict[int, Op]]:
    """Evaluate what depends on weights only into `constants` and `origins`; the ops that remain, large broadcasts."""
    data_ops: list[Op] = []
    broadcasts: dict[int, Op] = {}

    def read(number: int) -> Value:
        if number in constants:
            return constants[number]
        return broadcasts[number].function(*map(read, broadcasts[number].inputs))[0]

    for op in ops:
        if not all(v in origins for v in op.inputs):
            data_ops.append(op)
            continue
        paths = frozenset().union(*(origins[v] for v in op.inputs))
        origins.update(dict.fromkeys(op.outputs, paths))
        if op.name in ("broadcast_in_dim", "iota") and avals[op.outputs[0]].size > _LAZY_SIZE:
            broadcasts[op.outputs[0]] = op
        else:
            constants.update(zip(op.outputs, op.function(*map(read, op.inputs)), strict=True))
    return data_ops, broadcasts


def _leaf_path(keys: Sequence[Any]) -> Path:
    return tuple(k.key for k in keys if isinstance(k, jax.tree_util.DictKey))


def trace(model: nnx.Module, args: tuple[Any, ...], call: Callable[..., Any]) -> Graph:
    """The graph of `call(model, *args)`.

    Args:
        model: in evaluation mode; it is not changed.
        args: example arguments: nested arrays, whose shapes the graph is bound to.
        call: how the network is called.

    Returns:
        The graph, with the state's values folded in.

    Raises:
        ValueError: a batch normalisation runs in training mode.
    """
    graphdef, state = nnx.split(model)  # a closure over the module would fail with nnx.jit or nnx.remat inside
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    paths = [_leaf_path(keys) for keys, _ in leaves]
    norms = [path for path, module in modules(model).items() if isinstance(module, nnx.BatchNorm)]

    def forward(values: list[Any], *arguments: Any) -> Any:
        merged = nnx.merge(graphdef, jax.tree.unflatten(tree, values))
        out = call(merged, *arguments)
        return out, [get(merged, path).mean[...] for path in norms]

    values = [value for _, value in leaves]
    closed, shapes = jax.make_jaxpr(forward, return_shape=True)(values, *args)
    out_tree = jax.tree.structure(shapes[0])
    flat = _Flattener()
    numbers = [flat.new(v.aval) for v in closed.jaxpr.invars]
    results = flat.run(closed.jaxpr, closed.consts, numbers)
    outputs = tuple(results[: out_tree.num_leaves])
    ops = _drop_dead(flat.ops, outputs)
    arguments = dict(zip(paths, numbers, strict=False))
    _refuse_training_mode(
        norms, arguments, dict(zip(norms, results[out_tree.num_leaves :], strict=True)), flat.ops, ops
    )

    constants = dict(flat.literals) | dict(zip(numbers, values, strict=False))
    origins = {v: frozenset() for v in flat.literals} | {v: frozenset([path]) for path, v in arguments.items()}
    data_ops, broadcasts = _fold_constants(ops, flat.avals, constants, origins)
    inputs = tuple(numbers[len(values) :])
    return Graph(data_ops, flat.avals, inputs, outputs, out_tree, origins, frozenset(paths), constants, broadcasts)


def _refuse_training_mode(
    norms: Iterable[Path],
    arguments: Mapping[Path, int],
    means: Mapping[Path, int],
    all_ops: Iterable[Op],
    live_ops: Iterable[Op],
) -> None:
    """Raise if a batch normalisation normalises with the batch's statistics, or moves its running ones."""
    read = {v for op in live_ops for v in op.inputs}
    # nnx.scan hands the state of its body back through the loop, changed or not.
    through_loops = {v for op in all_ops if op.is_loop for v in op.outputs}
    for path in norms:
        mean = next((arguments[p] for p in [(*path, "mean")] if p in arguments), None)
        moved = mean is not None and means[path] != mean and means[path] not in through_loops
        affine = any(arguments.get((*path, part)) in read for part in ("scale", "bias"))
        if moved or (affine and mean is not None and mean not in read):
            name = "/".join(map(str, path))
            raise ValueError(
                f"model: batch normalisation {name!r} runs in training mode; make it use its running average"
                " (for a flag that is passed at call time: call=lambda model, x: model(x, train=False))"
            )
