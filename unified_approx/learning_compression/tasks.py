"""Which parameters are compressed together, as what, and how."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flax import nnx

from solvers.compressions import Compression
from unified_approx.assemble import get
from unified_approx.pieces import Piece, Values, parameters_of, with_values
from unified_approx.rules import check_pattern
from unified_approx.sites import Path, path_name

__all__ = ["Piece", "Task", "Values", "assigned", "kernels_of", "parameters_of", "resolve", "with_values"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One compression of the parameters that a pattern names.

    Attributes:
        path: regular expression for whole names: of layers, whose kernels are meant. One that names no layer is for
            parameters, such as `fc1/bias` or `conv1/terms/0/u`.
        compression: of `solvers.compressions`.
        view: "matrix": each kernel as its (n, p) matrix; "vector": as one row of numbers.
        joint: all parameters named are one vector: one codebook, or one number of weights, for all of them. A form in
            `Each` still sees the layers one by one, as matrices.
        norm_after: a batch norm follows these layers. One that is compressed to nothing (rank 0) is then left out of
            penalty and multipliers: the norm undoes any shrinking on the way.
    """

    path: str
    compression: Compression
    view: str = "matrix"
    joint: bool = False
    norm_after: bool = False

    def __post_init__(self) -> None:
        check_pattern("tasks", self.path)
        if self.view not in ("matrix", "vector"):
            raise ValueError(f"tasks: view={self.view!r} of {self.path!r} is unknown; choose matrix or vector")
        if self.joint and self.view == "matrix":
            raise ValueError(f"tasks: {self.path!r} is joint, which only vectors can be; give view='vector'")


def resolve(tasks: Sequence[Task], model: nnx.Module) -> tuple[Piece, ...]:
    """The targets of the C steps, their compressions bound to the layers.

    Raises:
        ValueError: no tasks, one that names nothing, two that name the same parameter, or a size out of range.
    """
    values = parameters_of(model)
    kernels = kernels_of(model)
    return tuple(_bound(_piece(task, group, values, kernels), values) for task, group in assigned(tasks, model))


def kernels_of(model: nnx.Module) -> set[Path]:
    """The parameters that are kernels of convolutions and dense layers."""
    return {path for path in parameters_of(model) if path[-1] == "kernel" and _is_layer(model, path[:-1])}


def assigned(tasks: Sequence[Task], model: nnx.Module) -> list[tuple[Task, tuple[Path, ...]]]:
    """For each target of a C step its task and its parameters.

    Raises:
        ValueError: no tasks, one that names nothing, or two that name the same parameter.
    """
    if not tasks:
        raise ValueError("tasks: empty; give at least one Task")
    values, kernels = parameters_of(model), kernels_of(model)
    layers = {path_name(path[:-1]): path for path in values if path in kernels}
    parameters = {path_name(path): path for path in values}
    owner: dict[Path, Task] = {}
    found: list[tuple[Task, tuple[Path, ...]]] = []
    for task in tasks:
        paths = _matching(task.path, layers) or _matching(task.path, parameters)
        if not paths:
            known = ", ".join([*layers, *parameters])
            raise ValueError(f"tasks: {task.path!r} names no layer and no parameter; there are: {known}")
        for path in paths:
            if path in owner:
                raise ValueError(
                    f"tasks: {path_name(path)!r} is named by {owner[path].path!r} and by {task.path!r}; name it once, "
                    "and use Additive for a sum of compressions"
                )
            owner[path] = task
        found += [(task, group) for group in ([paths] if task.joint else [(path,) for path in paths])]
    return found


def _matching(pattern: str, names: Mapping[str, Path]) -> tuple[Path, ...]:
    return tuple(path for name, path in names.items() if re.fullmatch(pattern, name))


def _is_layer(model: nnx.Module, path: Path) -> bool:
    return isinstance(get(model, path), nnx.Conv | nnx.Linear)


def _piece(task: Task, paths: tuple[Path, ...], values: Values, kernels: set[Path]) -> Piece:
    is_kernel = tuple(path in kernels for path in paths)
    name = path_name(paths[0][:-1] if is_kernel[0] else paths[0]) if len(paths) == 1 else task.path
    matrix = task.view == "matrix" and values[paths[0]].ndim > 1
    shapes = tuple(values[path].shape for path in paths)
    return Piece(name, task.compression, paths, shapes, is_kernel, matrix, task.norm_after)


def _bound(piece: Piece, values: Values) -> Piece:
    try:
        return replace(piece, compression=piece.compression.bind(piece.pack(values), piece.layers))
    except ValueError as error:
        raise ValueError(f"tasks: {piece.name}: {error}") from error
