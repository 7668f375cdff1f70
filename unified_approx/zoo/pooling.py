"""Poolings that Flax has not, with PyTorch's borders."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def ceil_max_pool(x: Float[Array, "b h w c"], window: int, stride: int, padding: int = 0) -> Float[Array, "b h2 w2 c"]:
    """PyTorch's `MaxPool2d(window, stride, padding, ceil_mode=True)`: windows may stick out at the lower right.

    A window that would start in the padding to the right of the image is left out, as PyTorch does. An image smaller
    than the window, which PyTorch refuses, gives one pixel.
    """
    pads = [_ceil_padding(size, window, stride, padding) for size in x.shape[1:3]]
    return nnx.max_pool(x, (window, window), (stride, stride), pads)  # pyright: ignore[reportArgumentType]


def _ceil_padding(size: int, window: int, stride: int, padding: int) -> tuple[int, int]:
    count = max(0, -(-(size + 2 * padding - window) // stride)) + 1
    if (count - 1) * stride >= size + padding:
        count -= 1
    return padding, max(0, (count - 1) * stride + window - size - padding)


def adaptive_mean_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b size size c"]:
    """PyTorch's `AdaptiveAvgPool2d(size)`: row i is the mean of rows floor(i h / size) to ceil((i + 1) h / size)."""
    for axis in (1, 2):
        length = x.shape[axis]
        if length != size:
            bounds = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
            take = (slice(None),) * axis
            x = jnp.stack([jnp.mean(x[(*take, slice(*bound))], axis=axis) for bound in bounds], axis=axis)
    return x
