"""Which modules of a network are layers that can be replaced, and why the others are not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from solvers.activation import IDENTITY, Activation
from unified_approx.assemble import modules, shared_modules
from unified_approx.epilogue import AffineStep, Epilogue, compose, follow
from unified_approx.graph import Graph, Op
from unified_approx.im2col import Geometry, Padding, is_channels_last
from unified_approx.sites import LayerSite, Path, Skipped, path_name

_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.RMSNorm)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer: its operation, the number of its input, what follows it."""

    op: Op
    x: int
    epilogue: Epilogue


@dataclass(frozen=True, eq=False)
class _Context:
    graph: Graph
    modules: Mapping[Path, Any]
    homes: Mapping[Path, tuple[Path, ...]]
    known: list[Activation]
    images: int

    def leaf(self, path: Path, name: str) -> Path | None:
        """Path of a Variable of the module in the traced state, which has one leaf for a shared module."""
        return next((q for p in self.homes[path] if (q := (*p, name)) in self.graph.leaf_paths), None)


def find_layers(
    graph: Graph, model: nnx.Module, images: int
) -> tuple[list[tuple[LayerSite, list[Call]]], list[Skipped]]:
    """The layers of a network with their calls, in execution order, and the modules with weights that are left out.

    Args:
        graph: of the network, traced on `images` images.
        model: the same network; a convolution or dense layer is an instance of nnx.Conv or nnx.Linear.
        images: length of the arguments' first axis.
    """
    shared = shared_modules(model)
    homes = {p: next((ps for ps in shared if p in ps), (p,)) for p in modules(model)}
    context = _Context(graph, modules(model), homes, [], images)
    found, skipped = [], []
    for path, module in context.modules.items():
        if isinstance(module, (nnx.Conv, nnx.Linear)):
            calls = _find_calls(context, path, module)
            if isinstance(calls, str):
                skipped.append(Skipped(path, type(module).__name__, calls))
            else:
                found.append(_make_site(context, path, module, calls))
        elif not isinstance(module, _NORMS) and _has_matrix(module):
            skipped.append(Skipped(path, type(module).__name__, "neither an nnx.Conv nor an nnx.Linear"))
    found.sort(key=lambda layer: graph.producer[layer[1][0].epilogue.output])
    return found, skipped + _hidden_weights(graph)


def _has_matrix(module: Any) -> bool:
    return any(isinstance(v, nnx.Param) and len(v.shape) > 1 for v in vars(module).values())


def _hidden_weights(graph: Graph) -> list[Skipped]:
    """Convolutions and products with constants that are not the network's Variables."""
    out = []
    for op in graph.ops:
        if op.name in ("conv_general_dilated", "dot_general"):
            kernel = op.inputs[1]
            if graph.is_constant(kernel) and not graph.origins[kernel]:
                shape = graph.avals[kernel].shape
                reason = f"weights of shape {shape} are no Variable of the network (held by a function's closure?)"
                out.append(Skipped((), op.name, reason))
    return out


def _find_calls(context: _Context, path: Path, module: nnx.Conv | nnx.Linear) -> list[Call] | str:
    """The calls of a layer, or the reason why it cannot be replaced."""
    graph, kernel = context.graph, context.leaf(path, "kernel")
    owners = [p for p, m in context.modules.items() if getattr(m, "kernel", None) is module.kernel]
    if len(owners) > 1:
        return f"kernel shared by the modules {', '.join(map(path_name, owners))}"
    reads = [
        (op, position)
        for op in graph.ops
        for position, v in enumerate(op.inputs)
        if graph.is_constant(v) and kernel in graph.origins[v]
    ]
    if not reads:
        return "never called (or the outputs do not depend on it)"
    calls = []
    for op, position in reads:
        reason = _refuse_module(module) or _refuse_call(context, op, position, module)
        if reason is not None:
            return reason
        call = Call(op, op.inputs[0], follow(graph, op.outputs[0], context.known))
        if module.bias is not None and _num_own(graph, module, call.epilogue) == 0:
            return "its bias is not added right after it"
        calls.append(call)
    if len({graph.avals[c.x].shape[1:] for c in calls}) > 1:
        return "called on inputs of different shapes"
    return calls


def _refuse_module(module: nnx.Conv | nnx.Linear) -> str | None:
    """Why a layer with these attributes is not supported."""
    if type(module).__call__ not in (nnx.Conv.__call__, nnx.Linear.__call__):
        return "its class has its own __call__"
    if isinstance(module, nnx.Linear):
        return None
    dims = len(module.kernel_size)
    if module.feature_group_count != 1:
        depthwise = module.feature_group_count == module.in_features
        return "depthwise convolution" if depthwise else "grouped convolution"
    if dims != 2:
        return f"{dims}-D convolution: only 2-D ones are supported"
    if set(_per_axis(module.input_dilation, dims)) != {1}:
        return "input dilation (a transposed convolution)"
    if isinstance(_padding(module), str) and _padding(module) not in ("SAME", "VALID"):
        return f"padding {_padding(module)!r}: only SAME, VALID and explicit padding are supported"
    return None


def _refuse_call(context: _Context, op: Op, position: int, module: nnx.Conv | nnx.Linear) -> str | None:
    """Why this use of the kernel is not a plain call of the layer."""
    graph = context.graph
    if op.is_loop:
        return f"kernel used inside {op.name}, a loop or branch"
    if op.name != ("conv_general_dilated" if isinstance(module, nnx.Conv) else "dot_general") or position != 1:
        return f"kernel used by {op.name} as operand {position}, not as by a plain call"
    used, own = np.asarray(graph.constant(op.inputs[1])), np.asarray(module.kernel[...])
    if used.shape != own.shape or not np.array_equal(used, own.astype(used.dtype), equal_nan=True):
        return "kernel transformed before its use (a mask, a transposition, a normalisation)"
    if not _same_parameters(graph, op, module):
        return "called with other parameters than the module's"
    rows = graph.avals[op.outputs[0]].shape[0]
    if rows == 0 or rows % context.images:
        return f"its first axis ({rows}) does not run over the {context.images} images"
    return None


def _same_parameters(graph: Graph, op: Op, module: nnx.Conv | nnx.Linear) -> bool:
    """Whether the operation is the one that the module's attributes describe."""
    x = graph.avals[op.inputs[0]]
    if isinstance(module, nnx.Linear):
        return len(x.shape) > 1 and op.params["dimension_numbers"] == (((len(x.shape) - 1,), (0,)), ((), ()))
    geometry, params = _geometry(module), op.params
    padding = geometry.padding
    if isinstance(padding, str):
        window = [(k - 1) * d + 1 for k, d in zip(geometry.window, geometry.dilation, strict=True)]
        padding = tuple(lax.padtype_to_pads(x.shape[1:-1], window, geometry.strides, padding))
    return (
        tuple(params["window_strides"]) == geometry.strides
        and tuple(params["rhs_dilation"]) == geometry.dilation
        and set(params["lhs_dilation"]) == {1}
        and tuple(map(tuple, params["padding"])) == padding
        and params["batch_group_count"] == 1
        and is_channels_last(params["dimension_numbers"], 2)
    )


def _per_axis(value: int | Sequence[int] | None, dims: int) -> tuple[int, ...]:
    return (value or 1,) * dims if value is None or isinstance(value, int) else tuple(value)


def _padding(module: nnx.Conv) -> Padding:
    padding = module.padding
    if isinstance(padding, str):
        return padding.upper()
    pairs = (padding,) * len(module.kernel_size) if isinstance(padding, int) else padding
    return tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in pairs)


def _geometry(module: nnx.Conv | nnx.Linear) -> Geometry:
    if isinstance(module, nnx.Linear):
        return Geometry((), module.in_features, module.out_features)
    dims = len(module.kernel_size)
    return Geometry(
        tuple(module.kernel_size),
        module.in_features,
        module.out_features,
        _per_axis(module.strides, dims),
        _padding(module),
        _per_axis(module.kernel_dilation, dims),
    )


def _make_site(
    context: _Context, path: Path, module: nnx.Conv | nnx.Linear, calls: list[Call]
) -> tuple[LayerSite, list[Call]]:
    geometry = _geometry(module)
    channels, own = geometry.c_out, [_num_own(context.graph, module, c.epilogue) for c in calls]
    if not _agree([compose(c.epilogue.steps, channels) for c in calls]):
        # One replacement cannot be right after different scales: stop right after the layer.
        calls = [replace(c, epilogue=c.epilogue.cut(k)) for c, k in zip(calls, own, strict=True)]
    norm, inner = _foldable(context, calls, own)
    activations = {c.epilogue.activation for c in calls}
    steps = calls[0].epilogue.steps
    scale, shift = compose(steps, channels)
    outer_scale, outer_shift = compose(steps[inner[0] :], channels)
    site = LayerSite(
        path=path,
        homes=context.homes[path],
        kind="conv" if isinstance(module, nnx.Conv) else "linear",
        geometry=geometry,
        activation=activations.pop() if len(activations) == 1 else IDENTITY,
        num_calls=len(calls),
        norm=norm,
        scale=scale,
        shift=shift,
        outer_scale=outer_scale,
        outer_shift=outer_shift,
        has_offset=any(c.epilogue.offsets for c in calls),
    )
    return site, calls


def _agree(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> bool:
    return all(np.array_equal(a, b) for pair in pairs for a, b in zip(pair, pairs[0], strict=True))


def _num_own(graph: Graph, module: nnx.Conv | nnx.Linear, epilogue: Epilogue) -> int:
    """How many of the first steps are the layer's own bias. By value: the Variable may be another layer's too."""
    if module.bias is None or not epilogue.steps:
        return 0
    step, dtype = epilogue.steps[0], graph.avals[epilogue.output].dtype
    bias = np.asarray(module.bias[...].astype(dtype)).astype(np.float64)
    return int((step.scale == 1).all() and np.array_equal(step.shift, bias))


def _foldable(context: _Context, calls: Sequence[Call], own: Sequence[int]) -> tuple[Path | None, list[int]]:
    """The batch norm that the layer's replacement can take over, and how many steps that then covers in each call.

    All calls must be followed by the same one, nothing else may read it, and it must not change the dtype.
    """
    graph, none = context.graph, (None, list(own))
    runs = [_norm_run(context, c.epilogue.steps, k) for c, k in zip(calls, own, strict=True)]
    norm = runs[0][0]
    if norm is None or any(path != norm for path, _ in runs):  # none, or not the same for all calls
        return none
    covered = {c.epilogue.steps[i].op for c, k, (_, e) in zip(calls, own, runs, strict=True) for i in range(k, e)}
    for index, op in enumerate(graph.ops):
        reads_norm = any(graph.is_constant(v) and _module_of(graph.origins[v]) >= {norm} for v in op.inputs)
        if reads_norm and index not in covered:
            return none
    for call, (_, end) in zip(calls, runs, strict=True):
        after = graph.avals[call.epilogue.steps[end - 1].output].dtype
        if after != graph.avals[call.epilogue.output].dtype:
            return none
    return norm, [end for _, end in runs]


def _norm_run(context: _Context, steps: Sequence[AffineStep], start: int) -> tuple[Path | None, int]:
    """The nnx.BatchNorm whose steps begin at `start`, and where they end; None unless it is all of it."""
    paths = _module_of(steps[start].origins) if start < len(steps) else set()
    norm = next(iter(paths), None)
    module = context.modules.get(norm) if norm is not None else None
    if len(paths) != 1 or not isinstance(module, nnx.BatchNorm) or type(module).__call__ is not nnx.BatchNorm.__call__:
        return None, start
    end = start
    while end < len(steps) and _module_of(steps[end].origins) == paths:
        end += 1
    found = compose(steps[start:end], len(steps[start].scale))
    dtype = context.graph.avals[steps[end - 1].output].dtype
    tolerance = 1e-4 if jnp.finfo(dtype).bits >= 32 else 3e-2
    pairs = zip(found, _batch_norm(module), strict=True)
    whole = all(np.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in pairs)
    return (norm, end) if whole else (None, start)


def _batch_norm(module: nnx.BatchNorm) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift of a batch norm that uses its running statistics."""
    read: Callable[[Any], np.ndarray] = lambda v: np.asarray(v[...]).astype(np.float64)  # noqa: E731
    scale = 1.0 / np.sqrt(read(module.var) + module.epsilon)
    if module.scale is not None:
        scale = scale * read(module.scale)
    shift = -read(module.mean) * scale
    return scale, shift if module.bias is None else shift + read(module.bias)


def _module_of(origins: frozenset[Path]) -> set[Path]:
    return {path[:-1] for path in origins}
