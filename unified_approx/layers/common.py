"""What the layers of all term kinds share: the index Variable, the contract, the checks."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import prod
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Shaped

from solvers.terms import Term
from unified_approx.im2col import Geometry, normalize, output_shape

CONVOLUTION = "convolution"
CHANNELS = "channels"
PATCHES = "patches"
TAPS = "taps"
PARAM_DTYPES = ("float32", "bfloat16", "float16")


class Index(nnx.Variable):
    """Integers that say where values stand: part of the state, never trained (not an `nnx.Param`)."""


class TermLayer(nnx.Module):
    """One summand of a factored layer: values that are trained, integers that are not, and a form to run them in.

    A subclass sets `kind` and `term_type`, names its arrays as the fields of the term, and implements the rest.

    Attributes:
        geometry: what the whole layer does; static.
        execution: one of `executions`; static. Every execution computes the same function.
    """

    kind: ClassVar[str]
    term_type: ClassVar[type]

    geometry: Geometry
    execution: str

    @classmethod
    @abstractmethod
    def from_term(
        cls, term: Term, geometry: Geometry, *, dtype: DTypeLike = "float32", execution: str | None = None
    ) -> "TermLayer":
        """The layer of a solved term.

        Args:
            term: arrays exactly as stored.
            geometry: the layer the term is part of.
            dtype: of the parameters.
            execution: one of `executions`; None takes the first.

        Raises:
            ValueError: the term does not fit the geometry, or the execution is not offered.
        """

    @abstractmethod
    def __call__(self, x: Float[Array, "batch *spatial c_in"]) -> Float[Array, "batch *out n"]:
        """The term applied to x, computed in x's dtype; no bias."""

    @abstractmethod
    def kernel(self, dtype: DTypeLike | None = None) -> Float[Array, "*window c_in n"]:
        """The term as a dense kernel, formed in `dtype` (the parameters' own by default); differentiable."""

    @abstractmethod
    def executions(self) -> tuple[str, ...]:
        """The forms this term can run in, the usual one first."""

    @abstractmethod
    def with_execution(self, execution: str) -> "TermLayer":
        """The same term run in another form, sharing the Variables."""

    @abstractmethod
    def macs(self, spatial: Sequence[int], execution: str | None = None) -> int:
        """Multiply-adds for one image of that spatial shape."""

    def copies(self, execution: str | None = None) -> int:
        """Input values gathered per output position before the product; their derivative is a slow scatter."""
        return 0

    @abstractmethod
    def tensors(self) -> dict[str, Shaped[Array, "..."]]:
        """The stored arrays, named as the fields of `term_type`."""

    def spec(self) -> dict[str, Any]:
        """JSON-able: everything besides `tensors()` that `from_spec` needs."""
        return {"kind": self.kind, "execution": self.execution}

    @classmethod
    def from_spec(
        cls, spec: Mapping[str, Any], tensors: Mapping[str, np.ndarray], geometry: Geometry, *, dtype: DTypeLike
    ) -> "TermLayer":
        """The layer that `spec()` and `tensors()` came from, bit for bit."""
        names = {field.name for field in fields(cls.term_type)}
        if set(tensors) != names:
            raise ValueError(f"tensors={sorted(tensors)}: a {cls.kind} term needs {sorted(names)}")
        term = cls.term_type(**{name: _as_stored(array) for name, array in tensors.items()})
        return cls.from_term(term, geometry, dtype=dtype, execution=spec["execution"])

    def term(self) -> Term:
        """The present values as a term in float32: for costs, plots and further solves."""
        return self.term_type(**{name: _as_stored(np.asarray(array)) for name, array in self.tensors().items()})

    def macs_per_position(self, execution: str | None = None) -> float:
        """Multiply-adds per output position, for an image so large that borders do not matter."""
        spatial = tuple(128 * s * d * k for s, d, k in _axes(self.geometry))
        return self.macs(spatial, execution) / prod(output_shape(spatial, self.geometry))


def _axes(geometry: Geometry) -> list[tuple[int, int, int]]:
    g = normalize(geometry)
    return list(zip(g.strides, g.dilation, g.window, strict=True))


def _as_stored(array: np.ndarray) -> np.ndarray:
    """Float32 or int32, what terms are made of; exact for every parameter dtype we accept."""
    return np.asarray(array, np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32)


def parameter(values: np.ndarray | Array, dtype: DTypeLike) -> nnx.Param[Array]:
    """A trainable array in `dtype`."""
    if jnp.dtype(dtype).name not in PARAM_DTYPES:
        raise ValueError(f"dtype={dtype}: parameters are stored as one of {', '.join(PARAM_DTYPES)}")
    return nnx.Param(jnp.asarray(values, dtype))


def index(values: np.ndarray | Array) -> Index:
    """An int32 array that is not trained."""
    return Index(jnp.asarray(values, jnp.int32))


def check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless `array` has that shape."""
    if array.shape != shape:
        raise ValueError(f"{name}.shape={array.shape}: the layer's geometry needs {shape}")


def check_window(kind: str, geometry: Geometry, axes: int | None = None) -> None:
    """Raise a ValueError unless the layer is a convolution, with that many spatial axes if it matters."""
    if not geometry.window or axes not in (None, len(geometry.window)):
        needed = "a convolution" if axes is None else f"a {axes}-D convolution"
        raise ValueError(f"window={geometry.window}: a {kind} term needs {needed}; use low rank instead")


def check_indices(name: str, indices: np.ndarray, total: int, *, increasing: bool = True) -> None:
    """Raise a ValueError unless `indices` are distinct, within range(total) and, if so required, increasing."""
    if indices.ndim != 1 or (indices.size and (indices.min() < 0 or indices.max() >= total)):
        raise ValueError(f"{name}: need integers in [0, {total}) in one axis, got shape {indices.shape}: {indices[:8]}")
    if increasing and np.any(np.diff(indices) <= 0):
        raise ValueError(f"{name}: must be strictly increasing; sort and deduplicate them together with their values")
    if len(np.unique(indices)) != len(indices):
        raise ValueError(f"{name}: has repeated entries")


def check_execution(execution: str | None, offered: tuple[str, ...]) -> str:
    """`execution`, or the first on offer when None; a ValueError for any other name."""
    if execution is None:
        return offered[0]
    if execution not in offered:
        raise ValueError(f"execution={execution!r}: this layer offers {', '.join(offered)}")
    return execution
