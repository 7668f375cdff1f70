"""Layers as matrices: the geometry of a layer, its patches, and the round trip between kernels and matrices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from solvers.terms import MatrixShape

Padding = str | tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Geometry:
    """What a convolution or dense layer does to its input, apart from its weights.

    Attributes:
        window: kernel size per spatial axis; () for a dense layer, which acts on the last axis.
        c_in: input channels (features).
        c_out: output channels (features).
        strides: per spatial axis.
        padding: "SAME", "VALID", or ((low, high), ...) per spatial axis.
        dilation: kernel dilation per spatial axis.
    """

    window: tuple[int, ...]
    c_in: int
    c_out: int
    strides: tuple[int, ...] = ()
    padding: Padding = "VALID"
    dilation: tuple[int, ...] = ()

    @property
    def matrix_shape(self) -> MatrixShape:
        """The layer as an (n, p) matrix."""
        return MatrixShape(self.window, self.c_in, self.c_out)


def normalize(geometry: Geometry) -> Geometry:
    """The same geometry as plain ints and tuples, strides and dilation written out; what cannot be is refused.

    Raises:
        ValueError: sizes below one, a number of strides, dilations or paddings that is not that of the window's axes,
            an unknown padding name, or negative padding.
    """
    axes = len(geometry.window)
    sizes = {"window": geometry.window, "c_in": (geometry.c_in,), "c_out": (geometry.c_out,)}
    sizes |= {"strides": geometry.strides or (1,) * axes, "dilation": geometry.dilation or (1,) * axes}
    for name, values in sizes.items():
        if any(v < 1 for v in values):
            raise ValueError(f"{name}={tuple(values)}: every entry must be at least 1")
    for name in ("strides", "dilation"):
        if len(sizes[name]) != axes:
            raise ValueError(f"{name}={tuple(sizes[name])}: give one per spatial axis of window={geometry.window}")
    return replace(
        geometry,
        window=tuple(int(v) for v in geometry.window),
        c_in=int(geometry.c_in),
        c_out=int(geometry.c_out),
        strides=tuple(int(v) for v in sizes["strides"]),
        dilation=tuple(int(v) for v in sizes["dilation"]),
        padding=_normalize_padding(geometry.padding, axes),
    )


def _normalize_padding(padding: Padding, axes: int) -> Padding:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f'padding={padding!r}: use "SAME", "VALID" or (low, high) pairs')
        return padding
    pairs = tuple((int(low), int(high)) for low, high in padding)
    if len(pairs) != axes or any(v < 0 for pair in pairs for v in pair):
        raise ValueError(f"padding={padding}: give {axes} (low, high) pairs, none negative")
    return pairs


def explicit_padding(spatial: Sequence[int], geometry: Geometry) -> tuple[tuple[int, int], ...]:
    """(low, high) zeros added per spatial axis of an input of that size."""
    g = normalize(geometry)
    if not isinstance(g.padding, str):
        return g.padding
    pads = lax.padtype_to_pads(tuple(spatial), _extent(g), g.strides, g.padding)
    return tuple((int(low), int(high)) for low, high in pads)


def _extent(g: Geometry) -> tuple[int, ...]:
    """Input pixels that one output sees, per axis."""
    return tuple((k - 1) * d + 1 for k, d in zip(g.window, g.dilation, strict=True))


def is_channels_last(numbers: Any, axes: int) -> bool:
    """Whether a convolution's dimension numbers are those of `nnx.Conv`: channels last, kernel (*window, in, out)."""
    last = (0, axes + 1, *range(1, axes + 1))
    kernel = (axes + 1, axes, *range(axes))
    return (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == (last, kernel, last)


def output_shape(spatial: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """Spatial shape of the output for an input of that spatial shape; a dense layer keeps whatever axes there are.

    Raises:
        ValueError: the input is smaller than the window, or has another number of axes.
    """
    if not geometry.window:
        return tuple(spatial)
    g = normalize(geometry)
    if len(spatial) != len(g.window):
        raise ValueError(f"spatial={tuple(spatial)}: window={g.window} needs {len(g.window)} spatial axes")
    pads = explicit_padding(spatial, g)
    out = tuple((s + sum(pad) - e) // t + 1 for s, pad, e, t in zip(spatial, pads, _extent(g), g.strides, strict=True))
    if min(out) < 1:
        raise ValueError(f"spatial={tuple(spatial)}: smaller than window={g.window} (dilation {g.dilation}); pad it")
    return out


def window_slices(
    x: Shaped[Array, "batch *spatial c_in"], geometry: Geometry, offsets: Sequence[int] | None = None
) -> Iterator[Shaped[Array, "batch *out c_in"]]:
    """For each window position (row-major; only the listed `offsets`, if given) the input pixels that it reads."""
    g = normalize(geometry)
    if not g.window:
        yield x
        return
    spatial = x.shape[1:-1]
    out = output_shape(spatial, g)
    padded = lax.pad(
        x,
        jnp.zeros((), x.dtype),
        ((0, 0, 0), *((low, high, 0) for low, high in explicit_padding(spatial, g)), (0, 0, 0)),
    )
    places = list(product(*map(range, g.window)))
    for index in range(len(places)) if offsets is None else offsets:
        start = tuple(o * d for o, d in zip(places[index], g.dilation, strict=True))
        stop = tuple(s + (n - 1) * t + 1 for s, n, t in zip(start, out, g.strides, strict=True))
        yield lax.slice(padded, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *g.strides, 1))


def patches(x: Shaped[Array, "batch *spatial c_in"], geometry: Geometry) -> Shaped[Array, "batch *out p"]:
    """im2col: every patch of x as a row, features ordered as a Flax kernel flattens (input channel fastest).

    Made by slicing, once per window position: on CPU several times faster than the convolution with an identity
    kernel that `jax.lax.conv_general_dilated_patches` runs. Holds prod(window) times the output positions of x.

    Raises:
        ValueError: x has another number of channels or axes than the geometry, or is smaller than the window.
    """
    _check_channels(x.shape, geometry)
    return jnp.concatenate(list(window_slices(x, geometry)), axis=-1)


def _check_channels(shape: tuple[int, ...], geometry: Geometry) -> None:
    if shape[-1] != geometry.c_in:
        raise ValueError(f"x.shape={shape}: the last axis must be c_in={geometry.c_in}, channels last")


def convolve(
    x: Float[Array, "batch *spatial c_in"], kernel: Float[Array, "*window c_in c_out"], geometry: Geometry
) -> Float[Array, "batch *out c_out"]:
    """The layer itself, without bias: a convolution, or x @ kernel when the window is ()."""
    if not geometry.window:
        return x @ kernel
    g = normalize(geometry)
    axes = "DHW"[-len(g.window) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        g.strides,
        g.padding if isinstance(g.padding, str) else list(g.padding),
        rhs_dilation=g.dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )


def sample_positions(num_images: int, out_shape: Sequence[int], d: int, seed: int) -> Int[np.ndarray, "d axes"]:
    """Rows (image, i, j, ...): d distinct output positions, sorted, spread over the images as evenly as possible.

    The counts of any two images differ by at most one; within an image positions are uniform without replacement.
    The same arguments give the same positions. When there are fewer than d positions, all of them.

    Raises:
        ValueError: no images, no positions, or d < 1.
    """
    per_image = prod(out_shape)
    if num_images < 1 or per_image < 1 or d < 1:
        raise ValueError(f"num_images={num_images}, out_shape={tuple(out_shape)}, d={d}: all must be at least 1")
    d = min(d, num_images * per_image)
    rng = np.random.default_rng(seed)
    counts = np.full(num_images, d // num_images)
    counts[rng.permutation(num_images)[: d % num_images]] += 1
    inside = [np.sort(rng.choice(per_image, count, replace=False)) for count in counts]
    number = np.repeat(np.arange(num_images) * per_image, counts) + np.concatenate(inside)
    return np.stack(np.unravel_index(number, (num_images, *out_shape)), axis=1)


def sample_rows(
    x: Shaped[np.ndarray | Array, "batch *spatial c_in"], geometry: Geometry, positions: Int[np.ndarray, "d axes"]
) -> Shaped[np.ndarray, "d p"]:
    """The rows of `patches(x, geometry)` at output positions (image, i, j, ...), gathered on the host.

    Memory: the result (d, p) and a few (d, c_in) temporaries; x is neither padded nor cut into patches.

    Raises:
        ValueError: positions outside the output, or x does not fit the geometry.
    """
    _check_channels(x.shape, geometry)
    out = (x.shape[0], *output_shape(x.shape[1:-1], geometry))
    if positions.shape[1] != len(out) or (positions.size and ((positions < 0) | (positions >= np.asarray(out))).any()):
        raise ValueError(
            f"positions of shape {positions.shape}: need rows (image, ...) inside the output's shape {out}"
        )
    source = np.asarray(x)
    if not geometry.window:
        return source[tuple(positions.T)]
    return _gather(source, positions[:, 0], positions[:, 1:], normalize(geometry))


def take_positions(
    values: Shaped[np.ndarray | Array, "batch *out n"], positions: Int[np.ndarray, "d axes"]
) -> Shaped[np.ndarray, "d n"]:
    """values[image, i, j, ...] for each position: the outputs that belong to the rows of `sample_rows`."""
    return np.asarray(values)[tuple(positions.T)]


def _gather(x: np.ndarray, image: np.ndarray, place: np.ndarray, g: Geometry) -> np.ndarray:
    spatial = np.asarray(x.shape[1:-1])
    corner = place * g.strides - [low for low, _ in explicit_padding(x.shape[1:-1], g)]
    taps = np.multiply(list(product(*map(range, g.window))), g.dilation)
    pixel = corner[:, None, :] + taps[None, :, :]
    outside = np.any((pixel < 0) | (pixel >= spatial), axis=2)
    number: Int[np.ndarray, "d taps"] = image[:, None] * prod(x.shape[1:-1])
    for axis, size in enumerate(spatial):
        number = number + np.clip(pixel[:, :, axis], 0, size - 1) * prod(x.shape[axis + 2 : -1])
    # One `take` of whole pixels, several times faster than a fancy index per window position.
    rows = np.take(x.reshape(-1, x.shape[-1]), number.astype(np.intp), axis=0, mode="clip")
    rows[outside] = 0
    return rows.reshape(len(image), -1)


def kernel_to_matrix(kernel: Shaped[Array, "*window c_in c_out"]) -> Shaped[Array, "n p"]:
    """A Flax kernel, (*window, c_in, c_out), as the (n, p) matrix that multiplies im2col rows."""
    return kernel.reshape(-1, kernel.shape[-1]).T


def matrix_to_kernel(matrix: Shaped[Array, "n p"], geometry: Geometry) -> Shaped[Array, "*window c_in c_out"]:
    """The inverse of `kernel_to_matrix`.

    Raises:
        ValueError: the matrix is not of the geometry's shape.
    """
    shape = geometry.matrix_shape
    if matrix.shape != (shape.n, shape.p):
        raise ValueError(f"matrix.shape={matrix.shape}: the geometry's matrix is {(shape.n, shape.p)}")
    return matrix.T.reshape(*geometry.window, geometry.c_in, geometry.c_out)
