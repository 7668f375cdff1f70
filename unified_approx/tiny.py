"""Convolutions to very small images, run as patches times matrix: XLA's are tens of times slower on CPU."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
from jaxtyping import Array, Float

from unified_approx.exchange import exchanging
from unified_approx.im2col import Geometry, is_channels_last, patches

TINY = 8  # output positions; at 2x2 the convolution runs at 2 GFLOP/s, patches times matrix at 145


def tiny_convolution(eqn: Any) -> Geometry | None:
    """The geometry of a plain convolution to so small an image; None of any other operation of a jaxpr."""
    if eqn.primitive.name != "conv_general_dilated":
        return None
    params, (x, kernel) = eqn.params, (v.aval for v in eqn.invars)
    axes = x.ndim - 2
    plain = (
        is_channels_last(params["dimension_numbers"], axes)
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and all(d == 1 for d in params["lhs_dilation"])
        and all(pad >= 0 for pair in params["padding"] for pad in pair)
    )
    if not plain or prod(eqn.outvars[0].aval.shape[1:-1]) > TINY:
        return None
    *window, c_in, c_out = kernel.shape
    return Geometry(
        tuple(window), c_in, c_out, params["window_strides"], tuple(params["padding"]), params["rhs_dilation"]
    )


@partial(jax.jit, static_argnums=2)
def by_patches(
    x: Float[Array, "batch *spatial c_in"], kernel: Float[Array, "*window c_in c_out"], geometry: Geometry
) -> Float[Array, "batch *out c_out"]:
    """The convolution as a matrix product."""
    return patches(x, geometry) @ kernel.reshape(-1, geometry.c_out)


def product(eqn: Any) -> Callable[..., Array] | None:
    """The exchange of a tiny convolution for a matrix product."""
    geometry = tiny_convolution(eqn)
    return None if geometry is None else partial(by_patches, geometry=geometry)


def as_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of (nested) arrays with its tiny convolutions as matrix products; differentiable as before.

    Convolutions inside loops, branches and functions with derivatives of their own stay as they are.
    """
    return exchanging(function, product)
