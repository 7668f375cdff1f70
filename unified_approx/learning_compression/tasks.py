"""Which parameters are compressed together, as what, and how."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from solvers.compressions import Compression
from solvers.compressions.base import Theta
from unified_approx.assemble import modules
from unified_approx.im2col import kernel_to_matrix
from unified_approx.rules import check_pattern
from unified_approx.sites import Path, path_name

Values = Mapping[Path, Float[Array, "..."]]
"""Parameters by path."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One compression of the parameters that a pattern names.

    Attributes:
        path: regular expression for whole names: of layers, whose kernels are meant, or of parameters such as
            `fc1/bias` or `conv1/terms/0/u`.
        compression: of `solvers.compressions`.
        view: "matrix": each kernel as its (n, p) matrix; "vector": as one row of numbers.
        joint: all parameters named are one vector: one codebook, or one number of weights, for all of them.
    """

    path: str
    compression: Compression
    view: str = "matrix"
    joint: bool = False

    def __post_init__(self) -> None:
        check_pattern("tasks", self.path)
        if self.view not in ("matrix", "vector"):
            raise ValueError(f"tasks: view={self.view!r} of {self.path!r} is unknown; choose matrix or vector")
        if self.joint and self.view == "matrix":
            raise ValueError(f"tasks: {self.path!r} is joint, which only vectors can be; give view='vector'")


@dataclass(frozen=True)
class Piece:
    """Parameters that are one target of a C step.

    Attributes:
        name: for reports.
        compression: likewise.
        paths: of the parameters.
        shapes: theirs.
        matrix: whether the one parameter is seen as a matrix.
        is_kernel: whether it is a layer's kernel, whose last axis are the outputs.
    """

    name: str
    compression: Compression
    paths: tuple[Path, ...]
    shapes: tuple[tuple[int, ...], ...]
    matrix: bool
    is_kernel: bool

    @property
    def size(self) -> int:
        """Weights in all."""
        return sum(prod(shape) for shape in self.shapes)

    def pack(self, values: Values) -> Float[Array, "..."]:
        """What the compression sees."""
        if self.matrix:
            value = values[self.paths[0]]
            return kernel_to_matrix(value) if self.is_kernel else value.reshape(value.shape[0], -1)
        return jnp.concatenate([values[path].reshape(-1) for path in self.paths])

    def unpack(self, target: Float[Array, "..."]) -> dict[Path, Float[Array, "..."]]:
        """The parameters, from what the compression sees."""
        if self.matrix:
            shape = self.shapes[0]
            return {self.paths[0]: (target.T if self.is_kernel else target).reshape(shape)}
        found, start = {}, 0
        for path, shape in zip(self.paths, self.shapes, strict=True):
            found[path] = target[start : start + prod(shape)].reshape(shape)
            start += prod(shape)
        return found

    def decompress(self, theta: Theta) -> dict[Path, Float[Array, "..."]]:
        """The parameters that theta stands for."""
        return self.unpack(self.compression.decompress(theta))


def parameters_of(model: nnx.Module) -> dict[Path, Float[Array, "..."]]:
    """All `nnx.Param`s by path, each once."""
    return {tuple(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def resolve(tasks: Sequence[Task], model: nnx.Module) -> tuple[Piece, ...]:
    """The targets of the C steps.

    Raises:
        ValueError: no tasks, one that names nothing, or two that name the same parameter.
    """
    if not tasks:
        raise ValueError("tasks: empty; give at least one Task")
    values = parameters_of(model)
    layers = {path for path, module in modules(model).items() if isinstance(module, nnx.Conv | nnx.Linear)}
    names = {path_name(path): path for path in values}
    names |= {path_name(path): (*path, "kernel") for path in layers}
    owner: dict[Path, Task] = {}
    pieces = []
    for task in tasks:
        paths = tuple(dict.fromkeys(path for name, path in names.items() if re.fullmatch(task.path, name)))
        if not paths:
            raise ValueError(f"tasks: {task.path!r} names no parameter; there are: {', '.join(sorted(names))}")
        for path in paths:
            if path in owner:
                raise ValueError(
                    f"tasks: {path_name(path)!r} is named by {owner[path].path!r} and by {task.path!r}; name it once, "
                    "and use Additive for a sum of compressions"
                )
            owner[path] = task
        groups = [paths] if task.joint else [(path,) for path in paths]
        pieces += [_piece(task, group, values, layers) for group in groups]
    return tuple(pieces)


def _piece(task: Task, paths: tuple[Path, ...], values: Values, layers: set[Path]) -> Piece:
    is_kernel = paths[0][:-1] in layers and paths[0][-1] == "kernel"
    name = path_name(paths[0][:-1] if is_kernel else paths[0]) if len(paths) == 1 else task.path
    matrix = task.view == "matrix" and values[paths[0]].ndim > 1
    shapes = tuple(values[path].shape for path in paths)
    return Piece(name, task.compression, paths, shapes, matrix, is_kernel)


def with_values(model: nnx.Module, values: Values) -> nnx.Module:
    """A copy of the network with these parameters."""
    new = nnx.clone(model)
    flat = dict(nnx.to_flat_state(nnx.state(new, nnx.Param)))
    nnx.update(new, nnx.from_flat_state({path: flat[path].replace(value) for path, value in values.items()}))
    return new
