"""Canonical (CP) terms: 1x1 to r channels, a filter of its own for each of these, 1x1 to all outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Shaped

from solvers.tensor_terms import Cp3, Cp4
from unified_approx.im2col import Geometry, explicit_padding, normalize, output_shape, window_slices
from unified_approx.layers.common import (
    CONVOLUTION,
    TAPS,
    TermLayer,
    check_execution,
    check_shape,
    check_window,
    parameter,
)


def depthwise(
    x: Float[Array, "batch *spatial r"], filters: Float[Array, "r places"], geometry: Geometry, execution: str
) -> Float[Array, "batch *out r"]:
    """Each channel convolved with its own filter; `geometry` has that many channels in and out.

    As taps, one multiplication of the shifted images by a number per channel for each place of the window, which XLA
    fuses: on CPU 70 to 260 times as fast as its depthwise convolution.
    """
    if execution == TAPS:
        shifted = list(window_slices(x, geometry))
        return sum((part * filters[:, i] for i, part in enumerate(shifted[1:], 1)), start=shifted[0] * filters[:, 0])
    g = normalize(geometry)
    axes = "DHW"[-len(g.window) :]
    return lax.conv_general_dilated(
        x,
        filters.T.reshape(*g.window, 1, g.c_in),
        g.strides,
        g.padding if isinstance(g.padding, str) else list(g.padding),
        rhs_dilation=g.dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=g.c_in,
    )


class _CpTerm(TermLayer):
    """What the canonical terms share. Strides, padding and dilation are the depthwise convolutions'.

    Executions:
        taps: depthwise as a sum of shifted images; usually the fastest on CPU.
        convolution: XLA's depthwise convolution.

    Attributes:
        first: (r, c_in).
        last: (n, r).
    """

    term_type: ClassVar[type[Cp3] | type[Cp4]]
    between: ClassVar[tuple[str, ...]]  # names of the filters, in the order of the window's axes

    first: nnx.Param[Array]
    last: nnx.Param[Array]

    def __init__(self, factors: Mapping[str, nnx.Param[Array]], geometry: Geometry, execution: str = TAPS):
        """Use `from_term`."""
        for name in self._names():
            setattr(self, name, factors[name])
        self.geometry = geometry
        self.execution = check_execution(execution, self.executions())

    @classmethod
    def from_term(
        cls, term: Cp3 | Cp4, geometry: Geometry, *, dtype: DTypeLike = "float32", execution: str | None = None
    ) -> "_CpTerm":
        """See `TermLayer.from_term`; refuses dense layers."""
        check_window(cls.kind, geometry, axes=len(cls.between) if len(cls.between) > 1 else None)
        if term.rank < 1:
            raise ValueError("rank=0: a CP term needs a rank of at least 1; leave it out")
        for name, shape in cls._shapes(term.rank, geometry).items():
            check_shape(name, getattr(term, name), shape)
        return cls({n: parameter(getattr(term, n), dtype) for n in cls._names()}, geometry, execution or TAPS)

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return ("first", *cls.between, "last")

    @classmethod
    def _shapes(cls, r: int, geometry: Geometry) -> dict[str, tuple[int, int]]:
        whole = len(cls.between) == 1
        sizes = (prod(geometry.window),) if whole else geometry.window
        ends = {"first": (r, geometry.c_in), "last": (geometry.c_out, r)}
        return ends | {name: (r, size) for name, size in zip(cls.between, sizes, strict=True)}

    def _stages(self, spatial: Sequence[int]) -> list[tuple[str, Geometry]]:
        """The depthwise convolutions in order: the filters' name, and the geometry; for an input of that size."""
        g = normalize(replace(self.geometry, c_in=self.rank, c_out=self.rank))
        if len(self.between) == 1:
            return [(self.between[0], g)]
        pads = explicit_padding(spatial, g)
        return [(name, _along(g, axis, pads[axis])) for axis, name in enumerate(self.between)]

    def _factor(self, name: str, dtype: DTypeLike | None) -> Array:
        return jnp.asarray(getattr(self, name)[...], dtype)

    @property
    def rank(self) -> int:
        """Channels in between."""
        return self.first.shape[0]

    def __call__(self, x: Float[Array, "batch *spatial c_in"]) -> Float[Array, "batch *out n"]:
        """To r channels, one filter each, to all outputs."""
        z = x @ self._factor("first", x.dtype).T
        for name, geometry in self._stages(x.shape[1:-1]):
            z = depthwise(z, self._factor(name, x.dtype), geometry, self.execution)
        return z @ self._factor("last", x.dtype).T

    def kernel(self, dtype: DTypeLike | None = None) -> Float[Array, "*window c_in n"]:
        """The composed kernel."""
        filters = self._factor(self.between[0], dtype)
        for name in self.between[1:]:
            filters = (filters[:, :, None] * self._factor(name, dtype)[:, None, :]).reshape(self.rank, -1)
        composed = jnp.einsum("rs,rc,or->sco", filters, self._factor("first", dtype), self._factor("last", dtype))
        return composed.reshape(*self.geometry.window, self.geometry.c_in, self.geometry.c_out)

    def executions(self) -> tuple[str, ...]:
        """Two forms of the depthwise convolutions."""
        return (TAPS, CONVOLUTION)

    def with_execution(self, execution: str) -> "_CpTerm":
        """See `TermLayer.with_execution`."""
        return type(self)({name: getattr(self, name) for name in self._names()}, self.geometry, execution)

    def macs(self, spatial: Sequence[int], execution: str | None = None) -> int:
        """The first convolution at every input position, the last at every output position."""
        total, size = prod(spatial) * self.first.size, tuple(spatial)
        for name, geometry in self._stages(spatial):
            size = output_shape(size, geometry)
            total += prod(size) * getattr(self, name).size
        return total + prod(size) * self.last.size

    def tensors(self) -> dict[str, Shaped[Array, "..."]]:
        """The factors."""
        return {name: getattr(self, name)[...] for name in self._names()}


def _along(g: Geometry, axis: int, padding: tuple[int, int]) -> Geometry:
    """The part of a convolution along one axis."""

    def only(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(v if i == axis else 1 for i, v in enumerate(values))

    pads = tuple(padding if i == axis else (0, 0) for i in range(len(g.window)))
    return replace(g, window=only(g.window), strides=only(g.strides), dilation=only(g.dilation), padding=pads)


class Cp3Term(_CpTerm):
    """One filter of the whole window per component.

    Attributes:
        middle: (r, places).
    """

    kind = "cp3"
    term_type = Cp3
    between = ("middle",)


class Cp4Term(_CpTerm):
    """One column and one row per component, of a 2-D convolution: the height first.

    Attributes:
        height: (r, kh).
        width: (r, kw).
    """

    kind = "cp4"
    term_type = Cp4
    between = ("height", "width")
