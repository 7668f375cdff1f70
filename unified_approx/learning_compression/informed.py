"""What of a task only a forward pass tells: how often a layer's weights are used, and whether a batch norm follows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flax import nnx

from solvers.compressions import Additive, Compression, OneOf, RankSelection
from solvers.compressions.rank_selection import MACS
from solvers.compressions.reshaping import SCHEMES
from unified_approx.assemble import get
from unified_approx.calling import Call
from unified_approx.im2col import output_shape
from unified_approx.layers import geometry_of
from unified_approx.learning_compression.tasks import Task, assigned, kernels_of
from unified_approx.macs import LayerCall, walk
from unified_approx.pieces import parameters_of
from unified_approx.sites import Path, path_name


def informed(
    tasks: Sequence[Task], model: nnx.Module, *example: Any, call: Call | None = None, normalize: bool = False
) -> list[Task]:
    """The tasks, one for each layer, with what a forward pass tells of it.

    `RankSelection(alpha, cost="macs")` gets the layer's output positions, and `norm_after` is set where a batch norm
    follows directly. Joint tasks stay as they are.

    Args:
        tasks: as for `lc`.
        model: the network.
        *example: the arguments of one call, the images along the first axis.
        call: how the network is called.
        normalize: count errors of a `RankSelection` relative to its layer: alpha is multiplied by ||w||^2.

    Raises:
        ValueError: tasks that overlap or name nothing.
    """
    walked = walk(model, example, call)
    calls: dict[Path, list[LayerCall]] = {}
    for found in walked.calls:
        calls.setdefault(found.path, []).append(found)
    normed = {layer for norm, layer in walked.follows.items() if isinstance(get(model, norm), nnx.BatchNorm)}
    values, kernels, new = parameters_of(model), kernels_of(model), []
    for task, paths in assigned(tasks, model):
        path, layer = paths[0], paths[0][:-1]
        if task.joint or path not in kernels:
            new.append(task if task.joint else replace(task, path=re.escape(path_name(path))))
            continue
        scale = float((values[path] ** 2).sum()) if normalize else 1.0
        costs = _Costs(get(model, layer), calls.get(layer, []), len(example[0]), scale)
        own = replace(task, path=re.escape(path_name(path)), compression=costs.put(task.compression))
        new.append(replace(own, norm_after=task.norm_after or layer in normed))
    return new


@dataclass(frozen=True)
class _Costs:
    """One layer, how it is used, and what its selected ranks are charged."""

    layer: nnx.Conv | nnx.Linear
    calls: Sequence[LayerCall]
    images: int
    scale: float

    def put(self, form: Compression) -> Compression:
        """The form with the costs in all its parts."""
        if isinstance(form, Additive | OneOf):
            return replace(form, parts=tuple(self.put(part) for part in form.parts))
        if not isinstance(form, RankSelection):
            return form
        priced = replace(form, alpha=form.alpha * self.scale)
        if form.cost != MACS:
            return priced
        if not self.calls:
            raise ValueError("cost: 'macs' of a layer that the network does not run; give numbers")
        schemes = [form.scheme] if form.scheme != "auto" else [s for s in SCHEMES if s == "rows" or self._is_spatial]
        parts = tuple(replace(priced, scheme=scheme, cost=self._uses(scheme)) for scheme in schemes)
        return parts[0] if len(parts) == 1 else OneOf(parts)

    @property
    def _is_spatial(self) -> bool:
        return isinstance(self.layer, nnx.Conv) and len(self.layer.kernel_size) == 2

    def _uses(self, scheme: str) -> tuple[float, float]:
        """Multiply-adds per value of u and of v; the first of two thin convolutions runs on every row of the image."""
        out, first = 0.0, 0.0
        for call in self.calls:
            positions = call.macs / self.images / self.layer.kernel[...].size
            out += positions
            height = call.input_shape[1] if self._is_spatial else 1
            low = output_shape(call.input_shape[1:-1], geometry_of(self.layer))[0] if self._is_spatial else 1
            first += positions * height / low if scheme == "spatial" else positions
        return out, first
