"""Parameters of a network as the targets of compressions: by path, as matrices or joined in one vector."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from solvers.compressions import Compression
from solvers.compressions.base import Theta
from solvers.terms import MatrixShape
from unified_approx.im2col import kernel_to_matrix
from unified_approx.sites import Path

Values = Mapping[Path, Float[Array, "..."]]
"""Parameters by path."""


@dataclass(frozen=True)
class Piece:
    """Parameters that are one target of a C step.

    Attributes:
        name: for reports.
        compression: what it becomes.
        paths: of the parameters.
        shapes: theirs.
        kernels: for each, whether it is a layer's kernel, whose last axis are the outputs.
        matrix: whether the one parameter is seen as a matrix.
        norm_after: whether a batch norm follows, to which the size of the parameter does not matter.
    """

    name: str
    compression: Compression
    paths: tuple[Path, ...]
    shapes: tuple[tuple[int, ...], ...]
    kernels: tuple[bool, ...]
    matrix: bool
    norm_after: bool = False

    @property
    def size(self) -> int:
        """Weights in all."""
        return sum(prod(shape) for shape in self.shapes)

    @property
    def layers(self) -> tuple[MatrixShape, ...]:
        """Each parameter as a matrix."""
        return tuple(map(_matrix_shape, self.shapes, self.kernels))

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Of what the compression sees."""
        return (self.layers[0].n, self.layers[0].p) if self.matrix else (self.size,)

    def pack(self, values: Values) -> Float[Array, "..."]:
        """What the compression sees."""
        own = [
            kernel_to_matrix(values[path]) if kernel else values[path].reshape(layer.n, layer.p)
            for path, kernel, layer in zip(self.paths, self.kernels, self.layers, strict=True)
        ]
        return own[0] if self.matrix else jnp.concatenate([matrix.reshape(-1) for matrix in own])

    def unpack(self, target: Float[Array, "..."]) -> dict[Path, Float[Array, "..."]]:
        """The parameters, from what the compression sees."""
        found, start, flat = {}, 0, target.reshape(-1)
        for path, shape, kernel, layer in zip(self.paths, self.shapes, self.kernels, self.layers, strict=True):
            matrix = flat[start : start + prod(shape)].reshape(layer.n, layer.p)
            found[path] = (matrix.T if kernel else matrix).reshape(shape)
            start += prod(shape)
        return found

    def decompress(self, theta: Theta) -> dict[Path, Float[Array, "..."]]:
        """The parameters that theta stands for."""
        return self.unpack(self.compression.decompress(theta))


def _matrix_shape(shape: tuple[int, ...], kernel: bool) -> MatrixShape:
    if kernel:
        return MatrixShape(shape[:-2], shape[-2], shape[-1])
    return MatrixShape((), prod(shape[1:]), shape[0]) if len(shape) > 1 else MatrixShape((), prod(shape), 1)


def parameters_of(model: nnx.Module) -> dict[Path, Float[Array, "..."]]:
    """All `nnx.Param`s by path, each once."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {cast(Path, tuple(path)): leaf[...] for path, leaf in flat}


def with_values(model: nnx.Module, values: Values) -> nnx.Module:
    """A copy of the network with these parameters."""
    new = nnx.clone(model)
    flat = dict(nnx.to_flat_state(nnx.state(new, nnx.Param)))
    nnx.update(new, nnx.from_flat_state({path: flat[path].replace(value) for path, value in values.items()}))
    return new
