"""Convolutions whose gradient with respect to the kernel is summed over parts of the batch.

XLA's CPU backend takes that gradient as one convolution whose window is the image, on one thread and out of cache: 20
to 60 GFLOP/s where the other two passes run at 80 to 240. Parts of a few images run in parallel and in cache, at 65 to
130 (3x3 kernels, 16 to 256 channels, batches of 128, two cores): a step of ResNet-20 takes three quarters of the time.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import jax
from jaxtyping import Array, Float

from unified_approx.exchange import exchanging
from unified_approx.tiny import product

_VALUES = 2**17  # of the input in one part: half a megabyte
_POSITIONS = (1024, 8192)  # output positions of one part: fewer, and adding the kernels up costs more than is won


def in_parts(eqn: Any) -> Callable[..., Array] | None:
    """The exchange of a convolution for one whose kernel's gradient is taken in parts; None where one part is best."""
    if eqn.primitive.name != "conv_general_dilated" or eqn.params["batch_group_count"] != 1:
        return None
    numbers, (x, kernel) = eqn.params["dimension_numbers"], (v.aval for v in eqn.invars)
    batch = x.shape[numbers.lhs_spec[0]]
    positions = prod(eqn.outvars[0].aval.shape[axis] for axis in numbers.out_spec[2:])
    least, most = _POSITIONS
    wanted = min(max(_VALUES // kernel.shape[numbers.rhs_spec[1]], least), most)
    parts = min(batch, round(batch * positions / wanted))
    return None if parts < 2 else partial(_convolution(parts), tuple(sorted(eqn.params.items())))


def for_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of (nested) arrays, of which a reverse-mode gradient is to be taken fast on a CPU.

    Forward-mode derivatives are not defined where convolutions were exchanged.
    """
    return exchanging(function, product, in_parts)


def _convolution(parts: int) -> Callable[..., Array]:
    """`conv_general_dilated` of (parameters, x, kernel) with that derivative."""

    def plain(params: Any, x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated_p.bind(x, kernel, **dict(params))

    def forward(params: Any, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return plain(params, x, kernel), (x, kernel)

    def backward(params: Any, seen: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
        x, kernel = seen
        numbers = dict(params)["dimension_numbers"]
        (of_x,) = jax.linear_transpose(lambda x: plain(params, x, kernel), x)(change)
        pairs = zip(_split(x, parts, numbers.lhs_spec[0]), _split(change, parts, numbers.out_spec[0]), strict=True)
        of_kernel = [jax.linear_transpose(partial(plain, params, part), kernel)(own)[0] for part, own in pairs]
        return of_x, sum(of_kernel[1:], start=of_kernel[0])

    convolution = jax.custom_vjp(plain, nondiff_argnums=(0,))
    convolution.defvjp(forward, backward)
    return convolution


def _split(x: Float[Array, "..."], parts: int, axis: int) -> list[Array]:
    cuts = [x.shape[axis] * i // parts for i in range(parts + 1)]
    return [jax.lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in pairwise(cuts)]
