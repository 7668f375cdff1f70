"""Which output channel of which layer stands where: the network's values, followed along their last axis.

Every output channel of a layer has a number. An operation that treats the channels of the last axis alike and apart
hands the numbers on; at any other the channels end: what enters it must stay as it is. So must the network's outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Bool, Int

from unified_approx.assemble import get, modules
from unified_approx.discover import Call
from unified_approx.epilogue import ELEMENTWISE
from unified_approx.graph import Graph, Op
from unified_approx.sites import LayerSite, Path

UNKNOWN = -1
Numbers = Int[np.ndarray, "..."]
_REDUCTIONS = ("reduce_max", "reduce_min", "reduce_prod", "reduce_sum", "reduce_and", "reduce_or")
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
_WINDOW_IS_ONE = {"window_dimensions": 1, "window_strides": 1, "base_dilation": 1, "window_dilation": 1}


@dataclass(frozen=True, eq=False)
class ChannelFlow:
    """The layers' channels and who sees them.

    Attributes:
        outputs: by layer, in execution order, the number of each output channel.
        inputs: by layer the number of the channel that each of its input channels is, `UNKNOWN` for any other data.
        norms: the same for the features of each batch normalisation.
        pinned: by number, whether something besides layers reads the channel, so that it has to stay.
    """

    outputs: Mapping[Path, Numbers]
    inputs: Mapping[Path, Numbers]
    norms: Mapping[Path, Numbers]
    pinned: Bool[np.ndarray, " channels"]

    def pin(self, numbers: Numbers) -> None:
        """Let these channels stay."""
        self.pinned[numbers[numbers != UNKNOWN]] = True


def channel_flow(graph: Graph, model: nnx.Module, found: Sequence[tuple[LayerSite, Sequence[Call]]]) -> ChannelFlow:
    """Follow the channels of all layers.

    Args:
        graph: of the network.
        model: the network.
        found: its layers and their calls, from `find_layers`.
    """
    follower = _Follower(graph, model, found)
    for op in graph.ops:
        follower.step(op)
    return follower.finish()


class _Follower:
    def __init__(self, graph: Graph, model: nnx.Module, found: Sequence[tuple[LayerSite, Sequence[Call]]]):
        self.graph, self.model = graph, model
        self.homes = {id(module): path for path, module in modules(model).items()}
        self.layer_of = {call.op: site.path for site, calls in found for call in calls}
        sizes = [site.geometry.c_out for site, _ in found]
        self.outputs: dict[Path, Numbers] = {
            site.path: np.arange(start, start + size)
            for (site, _), start, size in zip(found, np.cumsum([0, *sizes]), sizes, strict=False)
        }
        self.inputs: dict[Path, Numbers] = {}
        self.norms: dict[Path, Numbers] = {}
        self.pinned_norms: set[Path] = set()
        self.pinned = np.zeros(sum(sizes), bool)
        self.at: dict[int, Numbers] = {v: self._unknown(v) for v in graph.inputs}

    def _unknown(self, value: int) -> Numbers:
        shape = _shape(self.graph, value)
        return np.full(shape[-1] if shape else 1, UNKNOWN)

    def pin(self, numbers: Numbers) -> None:
        self.pinned[numbers[numbers != UNKNOWN]] = True

    def step(self, op: Op) -> None:
        """Number the channels of the operation's outputs; pin those of its inputs if it is not understood."""
        if op in self.layer_of:
            path, seen = self.layer_of[op], self.at[op.inputs[0]]
            self._agree(self.inputs, path, seen)
            self.at[op.outputs[0]] = self.outputs[path]
            return
        numbers = self._through(op)
        if numbers is None:
            self._end(op.inputs)
        self.at.update({v: self._unknown(v) if numbers is None else numbers for v in op.outputs})

    def finish(self) -> ChannelFlow:
        """What was found, the network's outputs pinned."""
        self._end(self.graph.outputs)
        for path in self.pinned_norms & set(self.norms):
            self.pin(self.norms[path])
        return ChannelFlow(self.outputs, self.inputs, self.norms, self.pinned)

    def _agree(self, known: dict[Path, Numbers], path: Path, seen: Numbers) -> bool:
        """Note what a module sees; if it has seen other channels before, all of them have to stay."""
        if np.array_equal(known.setdefault(path, seen), seen):
            return True
        self.pin(known[path])
        self.pin(seen)
        return False

    def _end(self, values: Sequence[int]) -> None:
        for v in values:
            if not self.graph.is_constant(v):
                self.pin(self.at[v])
                continue
            for owner in self._owners(v):
                self.pin(self.outputs.get(owner, np.zeros(0, int)))
                self.pinned_norms.add(owner)

    def _owners(self, constant: int) -> set[Path]:
        """The modules whose Variables a constant was computed from."""
        parents = {path[:-1] for path in self.graph.origins[constant]}
        return {self.homes.get(id(get(self.model, path)), path) for path in parents}

    def _through(self, op: Op) -> Numbers | None:
        """The numbers of the output's channels, None if the operation does not keep the channels apart."""
        shape = _shape(self.graph, op.outputs[0])
        data = [v for v in op.inputs if not self.graph.is_constant(v)]
        numbers = self.at[data[0]]
        if len(op.outputs) != 1 or any(not np.array_equal(self.at[v], numbers) for v in data):
            return None
        constants = [v for v in op.inputs if self.graph.is_constant(v)]
        if op.name in ELEMENTWISE:
            same = bool(shape) and all(_shape(self.graph, v)[-1:] == shape[-1:] for v in data)
            return numbers if same and all(self._applies(v, numbers, len(shape)) for v in constants) else None
        if any(self.graph.origins[v] or self.graph.scalar(v) is None for v in constants):
            return None
        before = _shape(self.graph, data[0])
        if op.name == "reshape":
            whole = op.params["dimensions"] is None and before and shape and numbers.size
            return np.tile(numbers, shape[-1] // before[-1]) if whole and shape[-1] % before[-1] == 0 else None
        keeps = _KEEPERS.get(op.name)
        return numbers if keeps is not None and before and keeps(op.params, before, shape) else None

    def _applies(self, constant: int, numbers: Numbers, axes: int) -> bool:
        """Whether an elementwise operand is one number, the layer's own bias, or of a batch norm of these channels."""
        origins, scalar = self.graph.origins[constant], self.graph.scalar(constant)
        if not origins:
            return scalar is not None
        owner, *others = self._owners(constant)
        module: Any = None if others else get(self.model, owner)
        if isinstance(module, nnx.BatchNorm):
            fits = module.axis in (-1, axes - 1) and module.num_features == len(numbers)
            return fits and self._agree(self.norms, owner, numbers)
        if owner in self.outputs and not others:
            return np.array_equal(self.outputs[owner], numbers)
        return scalar is not None and all(np.size(get(self.model, path)[...]) == 1 for path in origins)


def _shape(graph: Graph, value: int) -> tuple[int, ...]:
    return tuple(graph.avals[value].shape)


def _without_last(name: str) -> Callable[..., bool]:
    return lambda params, before, after: len(before) - 1 not in params[name]


def _windows(params: Mapping[str, Any], before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    ones = all(params[name] is None or params[name][-1] == one for name, one in _WINDOW_IS_ONE.items())
    return ones and tuple(params["padding"][-1]) == (0, 0)


def _broadcasts(params: Mapping[str, Any], before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return params["broadcast_dimensions"][-1] == len(after) - 1 and before[-1] == after[-1]


def _same_length(params: Mapping[str, Any], before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return before[-1] == after[-1]


# For each operation whether, with these parameters, the last axis comes out as it went in.
_KEEPERS: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(_REDUCTIONS, _without_last("axes")),
    **dict.fromkeys(_WINDOWS, _windows),
    "squeeze": _without_last("dimensions"),
    "rev": _without_last("dimensions"),
    "broadcast_in_dim": _broadcasts,
    "transpose": lambda params, before, after: params["permutation"][-1] == len(before) - 1,
    "slice": _same_length,  # all of the axis, unless it is a part, which is shorter
    "pad": lambda params, before, after: tuple(params["padding_config"][-1]) == (0, 0, 0),
    "concatenate": lambda params, before, after: params["dimension"] != len(before) - 1,
}
